"""What the attention tests share: seeded inputs and values together with gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twicing_core import twicing_attention


@pytest.fixture(scope="session")
def make_qkv() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Returns a function making the leaves query, key, value, always the same for the same arguments."""

    def make(batch=2, heads=4, seq=13, head_dim=8, *, key_heads=None, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seq)
        key_shape = (batch, key_heads or heads, seq, head_dim)
        shapes = ((batch, heads, seq, head_dim), key_shape, key_shape)
        qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        return tuple(tensor.requires_grad_() for tensor in qkv)

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[Tensor, ...]]:
    """Returns a function giving the output and the gradients of query, key and value (all in `dtype` if given)."""

    def run(qkv, *, dtype=None, function=twicing_attention, **options):
        leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in qkv]
        output = function(*leaves, **options)
        generator = torch.Generator().manual_seed(1)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

    return run


@pytest.fixture
def largest_tensor():
    """Returns a context manager whose `.elements` is the size of the largest tensor that any operator returned."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LargestTensor(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self.elements = max([self.elements, *sizes])
            return output

    return LargestTensor()
