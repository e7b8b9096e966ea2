"""The forward kernels under the emulator: a few cases of those that verify.py runs."""

from __future__ import annotations

import pytest
import torch
from cases import BATCH, DTYPES, HEAD_DIMS, HEADS, Case, documents_of, every_case, pairwise_cases
from emulated import kernels
from verification import check_clean, check_forward

COMPILED = [("bf16", head_dim) for head_dim in HEAD_DIMS] + [("fp16", 64), ("fp16", 96)]
FEW = pairwise_cases([case for case in every_case() if case.seq <= 257 and (case.dtype, case.head_dim) in COMPILED])


@pytest.mark.parametrize("case", FEW, ids=str)
def test_accuracy_and_no_errors(case: Case) -> None:
    check_forward(case)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bit_equal_over_schedules(head_dim: int) -> None:
    case = Case("bf16", head_dim, 150, causal=True, grouped=True)
    library = kernels(torch.bfloat16, head_dim)
    runs = [library.forward(*case.inputs, is_causal=True, seed=seed) for seed in range(4)]
    for run in runs:
        check_clean(run, case)
        for name in ("output", "u", "lse"):
            assert torch.equal(run[name], runs[0][name])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype: str, causal: bool) -> None:
    """Logits of hundreds, of both signs: one key wins, and all others underflow."""
    case = Case(dtype, 64, 130, causal=causal, query_scale=25.0, scale=1.0)
    query, key, _ = case.inputs
    logits = query.double() @ key.double().mT
    assert logits.max() > 200 and logits.min() < -200
    check_forward(case)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0])
def test_scale(scale: float) -> None:
    check_forward(Case("bf16", 32, 100, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_that_truncate(dtype: str) -> None:
    """Hardware rounds the sums of its products towards zero, or near it: the accuracy must not depend on better."""
    check_forward(Case(dtype, 64, 256), truncate=True)


@pytest.mark.parametrize("head_dim", [16, 96])
def test_views_of_a_fused_projection(head_dim: int) -> None:
    """(batch, seq, 3, heads, head_dim) as one linear layer gives it, without a copy."""
    case = Case("bf16", head_dim, 77, causal=True)
    fused = torch.stack([tensor.transpose(1, 2) for tensor in case.inputs], dim=2)
    views = [part.transpose(1, 2) for part in fused.unbind(dim=2)]
    library = kernels(torch.bfloat16, head_dim)
    run, contiguous = library.forward(*views, is_causal=True), library.forward(*case.inputs, is_causal=True)
    check_clean(run, case)
    assert views[0].stride(2) == 3 * HEADS * head_dim
    assert torch.equal(run["output"], contiguous["output"])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_documents_do_not_see_each_other(causal: bool) -> None:
    """Changing one document changes not a bit of the others."""
    case = Case("bf16", 64, 150, causal=causal, packed=True)
    library = kernels(torch.bfloat16, 64)
    before = library.forward(*case.inputs, **case.arguments())["output"]
    start, end = documents_of(case)[-2]
    row, positions = start // case.seq, torch.arange(start, end) % case.seq
    changed = [tensor.clone() for tensor in case.inputs]
    for tensor in changed:
        tensor[row, :, positions] += 1
    after = library.forward(*changed, **case.arguments())["output"]
    same = (before == after).all(dim=(1, 3))
    expected = torch.ones(BATCH, case.seq, dtype=torch.bool)
    expected[row, positions] = False
    assert torch.equal(same, expected)


def test_four_products_and_half_of_them_if_causal() -> None:
    """Of 2 seq^2 head_dim operations each; a causal one also does the upper half of the blocks on the diagonal."""
    case = Case("bf16", 64, 512)
    library = kernels(torch.bfloat16, 64)
    products = {
        causal: library.forward(*case.inputs, is_causal=causal).total("mma")
        * 16
        * 8
        * 16
        / (BATCH * HEADS * 512**2 * 64)
        for causal in (False, True)
    }
    assert products == {False: 4.0, True: 4.0 * (1 + 128 / 512) / 2}


@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17])
def test_short_sequences(seq: int) -> None:
    for causal in (False, True):
        check_forward(Case("bf16", 32, seq, causal=causal))
