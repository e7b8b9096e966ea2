"""The backward kernels under the emulator: a few cases of those that verify.py runs."""

from __future__ import annotations

import pytest
import torch
from cases import BATCH, HEADS, Case, documents_of, every_case, pairwise_cases
from emulated import kernels
from verification import check_backward, check_clean

COMPILED = [("bf16", 16), ("bf16", 32), ("bf16", 64), ("bf16", 96), ("bf16", 128), ("fp16", 64)]
FEW = pairwise_cases([case for case in every_case() if case.seq <= 130 and (case.dtype, case.head_dim) in COMPILED])


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_accuracy_and_no_errors(case: Case, deterministic: bool) -> None:
    check_backward(case, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_bit_equal_over_schedules(head_dim: int) -> None:
    """All gradients in deterministic mode; in the fast one, those of keys and values."""
    case = Case("bf16", head_dim, 150, causal=True, grouped=True)
    library = kernels(torch.bfloat16, head_dim)
    forward = library.forward(*case.inputs, is_causal=True)
    for deterministic in (False, True):
        options = {"is_causal": True, "deterministic": deterministic}
        runs = [library.backward(forward, case.grad_output, *case.inputs, seed=seed, **options) for seed in range(3)]
        for run in runs:
            check_clean(run, case)
            for name in ("grad_key", "grad_value", *(["grad_query"] if deterministic else [])):
                assert torch.equal(run[name], runs[0][name])


def test_tensor_cores_that_truncate() -> None:
    check_backward(Case("bf16", 64, 130), truncate=True)


def test_views_of_a_fused_projection() -> None:
    """Inputs as one linear layer gives them, and dO as the layer behind gives it, without a copy."""
    case = Case("bf16", 64, 77, causal=True)
    library = kernels(torch.bfloat16, 64)
    forward = library.forward(*case.inputs, is_causal=True)
    plain = library.backward(forward, case.grad_output, *case.inputs, is_causal=True, deterministic=True)
    fused = torch.stack([tensor.transpose(1, 2) for tensor in case.inputs], dim=2)
    views = [part.transpose(1, 2) for part in fused.unbind(dim=2)]
    grad_output = case.grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    run = library.backward(forward, grad_output, *views, is_causal=True, deterministic=True)
    check_clean(run, case)
    for name in ("grad_query", "grad_key", "grad_value"):
        assert torch.equal(run[name], plain[name])


def test_documents_do_not_see_each_other() -> None:
    """Changing dO of one document changes not a bit of the others' gradients."""
    case = Case("bf16", 64, 100, packed=True)
    library = kernels(torch.bfloat16, 64)
    forward = library.forward(*case.inputs, **case.arguments())
    start, end = documents_of(case)[-2]
    row, positions = start // case.seq, torch.arange(start, end) % case.seq
    changed = case.grad_output.clone()
    changed[row, :, positions] += 1
    before, after = (
        library.backward(forward, grad_output, *case.inputs, **case.arguments(), deterministic=True)
        for grad_output in (case.grad_output, changed)
    )
    expected = torch.ones(BATCH, case.seq, dtype=torch.bool)
    expected[row, positions] = False
    for name in ("grad_query", "grad_key", "grad_value"):
        assert torch.equal((before[name] == after[name]).all(dim=(1, 3)), expected)


def test_eight_products_and_eleven_if_deterministic() -> None:
    """Of 2 seq^2 head_dim operations each."""
    case = Case("bf16", 64, 256)
    library = kernels(torch.bfloat16, 64)
    forward = library.forward(*case.inputs)
    for deterministic, expected in ((False, [2, 6, 0]), (True, [2, 5, 4])):
        run = library.backward(forward, case.grad_output, *case.inputs, deterministic=deterministic)
        assert [launch.mma * 16 * 8 * 16 / (BATCH * HEADS * 256**2 * 64) for launch in run.launches] == expected
