"""`twicing_attention`: checks the arguments, then hands the call to a backend.

A backend is one module of this package with two functions: `attend` computes, and `refusal` says why it cannot do a
call. `BACKENDS` lists them, the fastest first.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from twicing_core import composed, fused, reference
from twicing_core.packing import values_are_readable


class Backend(Protocol):
    """What a backend module offers. It is only given calls that passed the checks of this file."""

    def attend(
        self,
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
        """Returns O, shaped like `query`. `attn_mask` is 4-D, bool or in the dtype of `query`."""

    def refusal(
        self,
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
        """Returns why this backend cannot do the call, or None if it can.

        With `auto` the choice is ours: the reason may be that another backend is expected to be faster.
        """


BACKENDS: dict[str, Backend] = {"fused": fused, "composed": composed, "reference": reference}


def twicing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Twicing Attention: softmax attention plus the attention of what its smoothing left behind.

    With ``A = softmax(query @ key.T * scale + mask)``, for each head,

        O = (2A - A @ A) @ value = 2U - A @ U,    U = A @ value

    (Abdullaev & Nguyen, "Transformer Meets Twicing", ICLR 2025, arXiv:2503.00687). Differentiable in `query`, `key`,
    `value` and a floating `attn_mask`.

    Args:
        query: (batch, heads, seq, head_dim), any floating dtype, any strides.
        key: (batch, key_heads, seq, head_dim), of the query's dtype and device. The keys are as many as the queries,
            because A is multiplied by itself. `key_heads` is `heads`, or a divisor of it with `enable_gqa`.
        value: shaped like `key`.
        is_causal: position i attends to positions j <= i only.
        scale: factor of the logits; None means ``1 / sqrt(head_dim)``.
        attn_mask: broadcastable to (batch, heads, seq, seq); bool (True: may attend) or floating (added to the
            logits, in the query's dtype). Not together with `is_causal` or `cu_seqlens`.
        cu_seqlens: (documents + 1,) int32: where documents start in the flattened batch * seq positions, in ascending
            order, with every row's start and the total included; a repeated offset is an empty document. Positions
            attend within their own document only. The values are checked where reading them costs no
            synchronisation: on the CPU, outside `torch.compile`.
        enable_gqa: query head h uses key head ``h // (heads // key_heads)``.
        dropout_p: in [0, 1): probability of zeroing an entry of A, always applied if not 0; A @ A is made of the
            same dropped A. Only the backend "reference" takes it.
        backend: "auto" takes the one expected to be the fastest that can do the call. "fused" is compiled kernels in
            O(seq) memory, built at first use, without mask and dropout: on the CPU of float32, bfloat16 and float16; on
            CUDA of bfloat16 and float16, with gradients up to head_dim 128. "composed" is two calls of torch's
            `scaled_dot_product_attention`, in O(seq) memory wherever torch has a fused kernel for the
            call. "reference" materialises A, in O(seq^2) memory.

    Returns:
        O, (batch, heads, seq, head_dim), in the query's dtype; under autocast, in the autocast dtype. A position that
        may attend to nothing gets zero, and passes no gradient.

    Raises:
        ValueError: an argument is not as described above, or the chosen `backend` cannot do the call.
    """
    query, key, value = _cast_for_autocast(query, key, value)
    _check_tensors(query, key, value, enable_gqa)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if attn_mask is not None:
        _check_mask(attn_mask, query, is_causal)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, query, attn_mask)
    call: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "attn_mask": attn_mask,
        "cu_seqlens": cu_seqlens,
        "dropout_p": dropout_p,
    }
    _, chosen = choose(backend, query, key, value, call)

    if query.numel() == 0:
        return query.clone()  # no positions: kernels need not know of empty grids
    return chosen.attend(query, key, value, **call)


def choose(backend: str, query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> tuple[str, Backend]:
    """Returns the backend for a call and its name, which is not "auto". `call`: what `Backend.attend` takes by name.

    Raises:
        ValueError: there is no such backend, or it cannot do the call.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(['auto', *BACKENDS])}; got {backend!r}")

    def refusal(name: str, auto: bool = False) -> str | None:
        return BACKENDS[name].refusal(query, key, value, **call, auto=auto)

    for name in BACKENDS if backend == "auto" else [backend]:
        reason = refusal(name, auto=backend == "auto")
        if reason is None:
            return name, BACKENDS[name]
    able = [name for name in BACKENDS if refusal(name) is None]
    raise ValueError(f"backend {backend!r} cannot do this call: {reason}; use {' or '.join(able)}")


def _cast_for_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts as autocast does before `scaled_dot_product_attention`: once here, so that no backend need know of it."""
    device_type = query.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(query), cast(key), cast(value)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have the query's dtype and device, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if not query.is_floating_point():
        raise ValueError(f"query, key and value must be floating point, got {query.dtype}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape, got {tuple(key.shape)} and {tuple(value.shape)}")

    batch, heads, seq, head_dim = query.shape
    key_batch, key_heads, key_seq, key_head_dim = key.shape
    if (batch, head_dim) != (key_batch, key_head_dim):
        raise ValueError(
            f"query and key must have the same batch and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if seq != key_seq:
        raise ValueError(f"query and key must have the same length, because A @ A is square, got {seq} and {key_seq}")
    if min(heads, key_heads, head_dim) < 1:
        raise ValueError(f"heads and head_dim must be at least 1, got {tuple(query.shape)} and {tuple(key.shape)}")
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads and key {key_heads}: pass enable_gqa=True for grouped queries")
    if heads % key_heads != 0:
        raise ValueError(f"the query's heads must be a multiple of the key's, got {heads} and {key_heads}")


def _check_mask(attn_mask: Tensor, query: Tensor, is_causal: bool) -> None:
    batch, heads, seq, _ = query.shape
    if is_causal:
        raise ValueError(
            "attn_mask and is_causal exclude each other: fold the causal mask into attn_mask, "
            "as in attn_mask & torch.ones(seq, seq, dtype=torch.bool).tril()"
        )
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool (True: may attend) or floating point, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device, {query.device}, got {attn_mask.device}")
    full = (batch, heads, seq, seq)
    aligned = full[4 - attn_mask.dim() :] if attn_mask.dim() <= 4 else None
    if aligned is None or any(size not in (1, want) for size, want in zip(attn_mask.shape, aligned, strict=True)):
        raise ValueError(f"attn_mask must be broadcastable to {full}, got shape {tuple(attn_mask.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor, query: Tensor, attn_mask: Tensor | None) -> None:
    batch, _, seq, _ = query.shape
    if attn_mask is not None:
        raise ValueError("attn_mask and cu_seqlens exclude each other: a mask can keep documents apart by itself")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must be 1-D int32, got {cu_seqlens.dim()}-D {cu_seqlens.dtype}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on the query's device, {query.device}, got {cu_seqlens.device}")
    if cu_seqlens.device.type != "cpu" or not values_are_readable(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[:1] != [0] or offsets[-1] != batch * seq:
        raise ValueError(f"cu_seqlens must start at 0 and end at batch * seq = {batch * seq}, got {_shorten(offsets)}")
    if offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must not decrease, got {_shorten(offsets)}")
    missing = set(range(0, batch * seq, max(seq, 1))) - set(offsets)
    if missing:
        raise ValueError(
            f"cu_seqlens must contain every row's start, since no document spans rows; "
            f"rows of {seq} positions, missing {_shorten(sorted(missing))}"
        )


def _shorten(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"[{', '.join(map(str, offsets[:8]))}, ...]"
