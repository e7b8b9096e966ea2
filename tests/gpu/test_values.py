"""Every kernel against float64, on the device: what the emulator showed of the source, shown of what runs."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from cases import Case, every_case, pairwise_cases
from verification import FORWARD_FACTOR, GRADIENT_FACTOR, accuracy, gradients

from twicing_core import preferences, twicing_attention
from twicing_core.fused import CUDA_BACKWARD_HEAD_DIM

CASES = pairwise_cases(every_case())
EXTREMES = [Case("bf16", 64, 197, causal, query_scale=40.0) for causal in (False, True)]  # logits of about +-200


@pytest.mark.parametrize("case", CASES + EXTREMES, ids=str)
def test_errors_are_within_the_rule(device, case):
    """At most 2x (gradients 3x) the error of torch computing the same formula in the same dtype; of every kernel."""

    def fitting(kernels):
        return [kernel for kernel in kernels if preferences.fits(kernel, case.seq, case.head_dim, case.causal)]

    offsets = None if case.cu_seqlens is None else case.cu_seqlens.to(device)
    qkv, options = [tensor.to(device) for tensor in case.inputs], (offsets, case.causal, case.logit_scale)
    exact = [tensor.double() for tensor in case.inputs]
    expected, by_torch = case.expected(*exact), case.by_torch(*case.inputs)
    for kernel in fitting(preferences.FORWARD_KERNELS):
        output, u, lse = torch.ops.twicing.forward(*qkv, *options, kernel)
        ratio = accuracy(output.cpu(), by_torch, expected)
        assert ratio <= FORWARD_FACTOR, (kernel, ratio)
    if case.head_dim > CUDA_BACKWARD_HEAD_DIM:
        return

    by_torch = gradients(case.by_torch, case.inputs, case.grad_output)
    expected = gradients(case.expected, exact, case.grad_output.double())
    least = 1e-2 * expected[2].abs().max().item() if case.seq == 1 else 0.0
    for kernel, deterministic in product(fitting(preferences.BACKWARD_KERNELS), (False, True)):
        ours = torch.ops.twicing.backward(
            case.grad_output.to(device), *qkv, output, u, lse, *options, kernel, deterministic
        )
        ratios = [accuracy(one.cpu(), by_torch[i], expected[i], least) for i, one in enumerate(ours)]
        assert max(ratios) <= GRADIENT_FACTOR, (kernel, deterministic, ratios)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [("long", "long"), ("short", "short"), ("wavefront", "wavefront"), ("wavefront_lag1", "wavefront")],
)
def test_forward_and_deterministic_backward_are_the_same_bits(device, forward, backward):
    """A race that the emulator cannot see would show here, sooner or later."""
    seq = 250 if forward == "short" else 1000
    query, key, value, grad_output = torch.randn(4, 8, 4, seq, 64, device=device).bfloat16()
    call = (None, True, 0.125)

    def results():
        saved = torch.ops.twicing.forward(query, key, value, *call, forward)
        return *saved, *torch.ops.twicing.backward(grad_output, query, key, value, *saved, *call, backward, True)

    first = results()
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


def test_more_than_two_to_the_31_elements(device):
    """The last head's rows lie beyond what 32 bits can count; it must be as if it were alone."""
    heads, seq, head_dim = 17, 2**20, 128  # 2.3e9 elements: 4.25 GiB each of seven tensors
    free, _ = torch.cuda.mem_get_info(device)
    if free < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    query, key, value = (torch.empty(1, heads, seq, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    offsets = torch.arange(0, seq + 1, 256, dtype=torch.int32, device=device)  # short documents, or it would take hours
    for tensor in (query, key, value):
        tensor.normal_()
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        output = torch.ops.twicing.forward(query, key, value, offsets, True, 0.1, "long")[0][:, one]
        alone = (tensor[:, one].contiguous() for tensor in (query, key, value))
        assert torch.equal(output, torch.ops.twicing.forward(*alone, offsets, True, 0.1, "long")[0])
        del output


@pytest.mark.parametrize("head_dim", [8, 20, 40, 80, 120, 200])
def test_head_dims_between_those_of_the_kernels(device, head_dim):
    qkv = torch.randn(3, 2, 3, 150, head_dim, device=device).bfloat16()
    actual = twicing_attention(*qkv, backend="fused")
    exact = twicing_attention(*qkv.double(), backend="reference")
    composed = twicing_attention(*qkv, backend="composed")
    assert (actual - exact).abs().max() <= 2 * (composed - exact).abs().max()
    assert actual.shape[-1] == head_dim and math.isfinite(actual.float().sum().item())
