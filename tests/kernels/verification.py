"""What it means for a kernel to be right, on one case. Used by the tests and, on every case, by verify.py.

Accuracy, as flash-attention's tests have it: the largest error against float64 may be twice that of the same formula
computed by torch in the same dtype, three times for gradients. (Torch may be exact by luck,
as with one position, where O = V; its error therefore counts as a 16th of the rounding of the largest value at least.)
"""

from __future__ import annotations

import math

import torch
from cases import Case, error
from emulator import Kernels, Run, kernels
from torch import Tensor

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def accuracy(actual: Tensor, by_torch: Tensor, expected: Tensor) -> float:
    """The error relative to torch's."""
    assert actual.isfinite().all(), "not finite"
    least = expected.abs().max().item() * torch.finfo(actual.dtype).eps / 16
    return error(actual, expected) / max(error(by_torch, expected), least)


def check_clean(run: Run, what: object) -> None:
    """No race, no stray access, no deadlock; no bank conflict in a fragment's load."""
    assert run.errors == 0, f"{what}: {run.errors} errors\n{run.log}"
    assert run.total("ldmatrix_passes") == 4 * run.total("ldmatrix"), f"{what}: bank conflicts"


def check_forward(case: Case, library: Kernels | None = None, **options: object) -> float:
    """Runs the forward, checks everything, and returns the error ratio of O."""
    library = library or kernels(case.inputs[0].dtype, case.head_dim)
    run = library.forward(*case.inputs, **case.arguments(), **options)
    check_clean(run, case)
    query, key, value = (tensor.double() for tensor in case.inputs)
    ratio = accuracy(run["output"], case.by_torch(*case.inputs), case.expected(query, key, value))
    assert ratio <= FORWARD_FACTOR, f"{case}: error {ratio:.2f} times torch's"

    lse, u = expected_lse_and_u(case)
    assert error(run["lse"], lse) <= 1e-4 * max(1.0, lse.abs().max().item()), f"{case}: lse"
    assert error(run["u"], u) <= 2 * u.abs().max().item() * torch.finfo(run["u"].dtype).eps, f"{case}: u"
    return ratio


def expected_lse_and_u(case: Case) -> tuple[Tensor, Tensor]:
    """In float64: log-sum-exp of each row of logits, and A V."""
    query, key, value = (tensor.double() for tensor in case.inputs)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.mT * case.logit_scale
    visible = torch.ones(case.seq, case.seq, dtype=torch.bool)
    if case.causal:
        visible = visible.tril()
    if case.cu_seqlens is not None:
        position = torch.arange(logits.shape[0] * case.seq).view(logits.shape[0], 1, case.seq)
        document = torch.bucketize(position, case.cu_seqlens[1:].long(), right=True)
        visible = visible & (document[..., :, None] == document[..., None, :])
    logits = logits.masked_fill(~visible, -math.inf)
    return logits.logsumexp(-1), logits.softmax(-1) @ value
