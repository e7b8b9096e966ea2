"""The backend "composed": two calls of torch's attention, so it runs, fused, wherever torch does."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from twicing_core.packing import attend_packed


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
    auto: bool,
) -> str | None:
    """Returns why this backend cannot do the call, or None if it can."""
    if dropout_p > 0.0:
        return f"dropout_p={dropout_p} must drop the same entries of A in both products"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """O = 2U - A @ U with U = A @ value. See `twicing_attention`.

    A is formed only where torch has no fused kernel for the call, as when `attn_mask` itself requires a gradient.
    """
    assert dropout_p == 0.0, "refused"
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # U has the query's heads, so a grouped second call would find keys and values of unequal heads, and torch
        # would silently take its path that forms A.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if cu_seqlens is None:
        return _twice(query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    return attend_packed(partial(_twice, scale=scale), query, key, value, cu_seqlens, is_causal)


def _twice(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    smooth = partial(F.scaled_dot_product_attention, query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    u = smooth(value)
    return 2 * u - smooth(u)


def _unit_stride(tensor: Tensor) -> Tensor:
    """torch's fused kernels want head_dim contiguous; of other strides it silently forms A."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
