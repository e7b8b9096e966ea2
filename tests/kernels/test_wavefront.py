"""The kernels for causal attention in one launch, under the emulator: a few cases of those that verify.py runs.

Blocks are in flight together here. Whatever they do, bits do not depend on their order.
"""

from __future__ import annotations

import pytest
import torch
from cases import BATCH, HEADS, Case, every_case, pairwise_cases
from emulated import Run, wavefront
from verification import check_backward, check_clean, check_forward

COMPILED = [("bf16", 32), ("bf16", 64), ("fp16", 96), ("bf16", 128)]
FEW = pairwise_cases(
    [case for case in every_case() if case.causal and case.seq <= 257 and (case.dtype, case.head_dim) in COMPILED]
)
SCHEDULES = [(0, 1), (0, 20), (1, 1), (2, 2), (3, 3), (4, 6), (5, 20)]  # seeds, and blocks in flight
LONG = Case("bf16", 32, 513, causal=True, packed=True)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_forward(case: Case, lag: int) -> None:
    library = wavefront(case.inputs[0].dtype, case.head_dim, lag)
    check_forward(case, library, seed=case.seq, resident=5)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("case", [case for case in FEW if case.seq <= 130], ids=str)
def test_backward(case: Case, deterministic: bool) -> None:
    library = wavefront(case.inputs[0].dtype, case.head_dim, 0)
    check_backward(case, library, deterministic=deterministic, seed=case.seq, resident=5)


def test_forward_is_bit_equal_over_schedules_and_lags() -> None:
    runs = [
        wavefront(torch.bfloat16, 32, lag).forward(*LONG.inputs, **LONG.arguments(), seed=seed, resident=resident)
        for lag in (0, 1)
        for seed, resident in SCHEDULES
    ]
    assert_equal(runs, "output", "u", "lse")


def test_backward_is_bit_equal_over_schedules() -> None:
    library, arguments = wavefront(torch.bfloat16, 32, 0), LONG.arguments()
    forward = library.forward(*LONG.inputs, **arguments)
    for deterministic, names in ((False, ["grad_key", "grad_value"]), (True, ["grad_query", "grad_key", "grad_value"])):
        runs = [
            library.backward(
                forward,
                LONG.grad_output,
                *LONG.inputs,
                **arguments,
                deterministic=deterministic,
                seed=seed,
                resident=resident,
            )
            for seed, resident in SCHEDULES[:5]
        ]
        assert_equal(runs, *names)


def assert_equal(runs: list[Run], *names: str) -> None:
    for run in runs:
        check_clean(run, "a schedule")
        for name in names:
            assert torch.equal(run[name], runs[0][name])


@pytest.mark.parametrize("lag", [0, 1])
def test_views_of_a_fused_projection(lag: int) -> None:
    """(batch, seq, 3, heads, head_dim) as one linear layer gives it, without a copy."""
    case, library = Case("bf16", 64, 150, causal=True), wavefront(torch.bfloat16, 64, lag)
    fused = torch.stack([tensor.transpose(1, 2) for tensor in case.inputs], dim=2)
    views = [part.transpose(1, 2) for part in fused.unbind(dim=2)]
    runs = [library.forward(*inputs, is_causal=True) for inputs in (case.inputs, views)]
    assert_equal(runs, "output", "u", "lse")


@pytest.mark.parametrize("lag", [0, 1])
def test_extreme_logits_and_scale(lag: int) -> None:
    check_forward(Case("fp16", 96, 150, causal=True, query_scale=20.0, scale=1.0), wavefront(torch.float16, 96, lag))


def test_three_products_forward_and_seven_backward() -> None:
    """Of 2 seq^2 head_dim operations each, of which causality leaves half and the upper part of the diagonal's tiles."""
    case = Case("bf16", 64, 512, causal=True)
    of_a_product = BATCH * HEADS * 512**2 * 64 / (16 * 8 * 16)
    for lag, keys in ((0, 32), (1, 64)):
        library = wavefront(torch.bfloat16, 64, lag)
        forward = library.forward(*case.inputs, is_causal=True)
        assert forward.total("mma") == 3 * of_a_product * (1 + keys / 512) / 2
    for deterministic, launches in ((False, [7, 0]), (True, [6, 4])):
        run = library.backward(forward, case.grad_output, *case.inputs, is_causal=True, deterministic=deterministic)
        assert [launch.mma for launch in run.launches] == [
            products * of_a_product * (1 + 64 / 512) / 2 for products in launches
        ]
