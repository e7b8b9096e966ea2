"""Gates on the compiled code; verify.py has all architectures, types and head dimensions."""

from __future__ import annotations

import compiled
import pytest
import torch
from cases import HEAD_DIMS
from emulated import kernels


@pytest.mark.skipif(compiled.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize(("head_dim", "architecture"), [(64, 80), (128, 90)])
def test_budgets(head_dim: int, architecture: int) -> None:
    found = compiled.compile_kernels("bf16", head_dim, architecture)
    assert len(found) == 7  # two of the forward, five of the backward
    for kernel in found:
        compiled.check(kernel)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_fits_the_smallest_device(head_dim: int) -> None:
    sizes = kernels(torch.bfloat16, head_dim).shared_bytes()
    assert sizes and max(sizes.values()) <= compiled.SHARED_BYTES
