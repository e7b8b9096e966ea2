"""The operator `torch.ops.twicing` in torch's dispatcher: its schema, its shapes and its gradient.

The kernels come from compiled libraries (`build`, `build_cuda`), which register themselves under these names.

    forward(query, key, value, cu_seqlens, is_causal, scale, kernel) -> (output, u, lse)
    backward(grad_output, query, key, value, output, u, lse, cu_seqlens, is_causal, scale, kernel, deterministic)
        -> (grad_query, grad_key, grad_value)
    multiplies_bfloat16() -> whether the CPU kernels have bfloat16 products; without, as of float16, they are in float32

With A the attention, u = A @ value and output = 2u - A @ u. Shapes: query, output and u (batch, heads, seq, head_dim);
key and value (batch, key_heads, seq, head_dim); lse (batch, heads, seq) float32, the log-sum-exp of each row of logits.
`kernel` names one of the CUDA kernels (`preferences.KERNELS`); any of them leaves what any backward needs. The CPU has
one, whatever the name. `deterministic`: whether the gradients are to be the same bits each time; on the CPU they always are.
Only `output` may be differentiated, and only once: then the backward's kernel is the preferred one, deterministic if
`torch.use_deterministic_algorithms` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twicing_core import preferences

torch.library.define(
    "twicing::forward",
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens, bool is_causal, float scale, str kernel)"
    " -> (Tensor output, Tensor u, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "twicing::backward",
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor u, Tensor lse,"
    " Tensor? cu_seqlens, bool is_causal, float scale, str kernel, bool deterministic) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define("twicing::multiplies_bfloat16", "() -> bool")


def _by_position(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape, laid out (batch, seq, heads, head_dim) as the kernels' results are."""
    batch, heads, seq, head_dim = tensor.shape
    return tensor.new_empty((batch, seq, heads, head_dim)).transpose(1, 2)


@torch.library.register_fake("twicing::forward")
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, is_causal: bool, scale: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return _by_position(query), _by_position(query), lse


@torch.library.register_fake("twicing::backward")
def _backward_shapes(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    u: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(query), _by_position(key), _by_position(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.is_causal, ctx.scale, _ = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad_output: Tensor, grad_u: None, grad_lse: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    kernel = preferences.backward_kernel(tensors[0], ctx.is_causal)
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = torch.ops.twicing.backward(
        grad_output, *tensors, cu_seqlens, ctx.is_causal, ctx.scale, kernel, deterministic
    )
    return (*gradients, None, None, None, None)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the fused twicing attention can be differentiated once only; use backend='reference' for second derivatives"
    )


torch.library.register_autograd("twicing::forward", _gradients, setup_context=_save)
torch.library.register_autograd("twicing::backward", _no_second_gradient)
