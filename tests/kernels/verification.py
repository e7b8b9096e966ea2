"""What it means for a kernel to be right, on one case. Used by the tests and, on every case, by verify.py.

Accuracy, as flash-attention's tests have it: the largest error against float64 may be twice that of the same formula
computed by torch in the same dtype, three times for gradients. (Torch may be exact by luck,
as with one position, where O = V; its error therefore counts as a 16th of the rounding of the largest value at least.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from cases import Case, error
from emulated import Kernels, Run, kernels
from torch import Tensor

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def accuracy(actual: Tensor, by_torch: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The error relative to torch's, which counts as `least` at least."""
    assert actual.isfinite().all(), "not finite"
    least = max(least, expected.abs().max().item()) * torch.finfo(actual.dtype).eps / 16
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


def check_backward(
    case: Case, library: Kernels | None = None, *, deterministic: bool = False, **options: object
) -> float:
    """Runs the backward on a forward's results, checks everything, and returns the largest error ratio."""
    library = library or kernels(case.inputs[0].dtype, case.head_dim)
    forward = library.forward(*case.inputs, **case.arguments())
    run = library.backward(
        forward, case.grad_output, *case.inputs, **case.arguments(), deterministic=deterministic, **options
    )
    check_clean(run, case)
    by_torch = gradients(case.by_torch, case.inputs, case.grad_output)
    expected = gradients(case.expected, [tensor.double() for tensor in case.inputs], case.grad_output.double())
    # With one position the gradients of queries and keys are 0, exactly so by torch: compare to that of the value.
    least = 1e-2 * expected[2].abs().max().item() if case.seq == 1 else 0.0
    ratios = [
        accuracy(run[name], by_torch[i], expected[i], least)
        for i, name in enumerate(("grad_query", "grad_key", "grad_value"))
    ]
    assert max(ratios) <= GRADIENT_FACTOR, f"{case}: errors {ratios} times torch's"
    return max(ratios)


def gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(attend(*leaves), leaves, grad_output)


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
