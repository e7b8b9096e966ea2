"""The short kernels under the emulator, forward and backward: a few cases of those that verify.py runs."""

from __future__ import annotations

import pytest
import torch
from cases import BATCH, DTYPES, HEADS, Case, documents_of, every_case, fits_short, pairwise_cases
from emulated import short
from verification import check_backward, check_clean, check_forward

COMPILED = [("bf16", 16), ("bf16", 32), ("bf16", 64), ("fp16", 64)]
POSSIBLE = [case for case in every_case() if fits_short(case) and (case.dtype, case.head_dim) in COMPILED]
GRADIENTS = ("grad_query", "grad_key", "grad_value")


def check(case: Case, **options: object) -> None:
    library = short(DTYPES[case.dtype], case.head_dim)
    check_forward(case, library, **options)
    check_backward(case, library, **options)


@pytest.mark.parametrize("case", pairwise_cases(POSSIBLE), ids=str)
def test_accuracy_and_no_errors(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("seq", [2, 15, 16, 17, 31, 32, 33, 128, 129])
def test_lengths_around_those_of_tiles(seq: int) -> None:
    for causal in (False, True):
        case = Case("bf16", 32, seq, causal=causal)
        check(case)


@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_bit_equal_over_schedules(head_dim: int) -> None:
    case = Case("bf16", head_dim, 150, causal=True, grouped=True)
    library = short(torch.bfloat16, head_dim)
    first: dict[str, torch.Tensor] = {}
    for seed in range(3):
        forward = library.forward(*case.inputs, seed=seed, is_causal=True)
        backward = library.backward(forward, case.grad_output, *case.inputs, seed=seed, is_causal=True)
        for run, names in ((forward, ("output", "u", "lse")), (backward, GRADIENTS)):
            check_clean(run, case)
            for name in names:
                assert torch.equal(run[name], first.setdefault(name, run[name])), name


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype: str, causal: bool) -> None:
    """Logits of hundreds, of both signs: one key wins, and all others underflow."""
    case = Case(dtype, 64, 130, causal=causal, query_scale=25.0, scale=1.0)
    check_forward(case, short(DTYPES[dtype], 64))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0])
def test_scale(scale: float) -> None:
    case = Case("bf16", 32, 100, scale=scale)
    check(case)


def test_tensor_cores_that_truncate() -> None:
    check(Case("bf16", 64, 200), truncate=True)


def test_views_of_a_fused_projection() -> None:
    """Inputs as one linear layer gives them, and dO as the layer behind gives it, without a copy."""
    case = Case("bf16", 64, 77, causal=True)
    library = short(torch.bfloat16, 64)
    fused = torch.stack([tensor.transpose(1, 2) for tensor in case.inputs], dim=2)
    views = [part.transpose(1, 2) for part in fused.unbind(dim=2)]
    grad_output = case.grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    assert views[0].stride(2) == 3 * HEADS * 64
    results = []
    for inputs, gradient in ((views, grad_output), (case.inputs, case.grad_output)):
        forward = library.forward(*inputs, is_causal=True)
        backward = library.backward(forward, gradient, *inputs, is_causal=True)
        check_clean(forward, case)
        check_clean(backward, case)
        results.append([forward["output"], *(backward[name] for name in GRADIENTS)])
    assert all(torch.equal(of_view, plain) for of_view, plain in zip(*results, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_documents_do_not_see_each_other(causal: bool) -> None:
    """Changing one document changes not a bit of the others' outputs and gradients."""
    case = Case("bf16", 64, 150, causal=causal, packed=True)
    library = short(torch.bfloat16, 64)
    start, end = documents_of(case)[-2]
    row, positions = start // case.seq, torch.arange(start, end) % case.seq
    results = []
    for change in (0, 1):
        tensors = [tensor.clone() for tensor in (*case.inputs, case.grad_output)]
        for tensor in tensors:
            tensor[row, :, positions] += change
        *inputs, grad_output = tensors
        forward = library.forward(*inputs, **case.arguments())
        backward = library.backward(forward, grad_output, *inputs, **case.arguments())
        results.append([forward["output"], *(backward[name] for name in GRADIENTS)])
    others = torch.ones(BATCH, case.seq, dtype=torch.bool)
    others[row, positions] = False
    for before, after in zip(*results, strict=True):
        same = (before == after).all(dim=(1, 3))
        assert same[others].all() and not same.all()


def test_three_and_seven_products_and_the_exponentials_once() -> None:
    """Of 2 seq^2 head_dim operations each; causal ones also do the upper half of the 32 x 32 blocks on the diagonal."""
    library, head = short(torch.bfloat16, 64), BATCH * HEADS * 256**2
    for causal, forward_products, backward_products in ((False, 3.0, 7.0), (True, 1.6875, 3.9375)):
        case = Case("bf16", 64, 256, causal=causal)
        forward = library.forward(*case.inputs, is_causal=causal)
        backward = library.backward(forward, case.grad_output, *case.inputs, is_causal=causal)
        assert forward.total("mma") * 16 * 8 * 16 / (head * 64) == forward_products
        assert backward.total("mma") * 16 * 8 * 16 / (head * 64) == backward_products
        if not causal:
            assert forward.total("exp2_lanes") == backward.total("exp2_lanes") == head
        assert len(forward.launches) == len(backward.launches) == 1
