"""The backend "reference": the definition, with A materialised. It does every call, and the others are tested by it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twicing_core.packing import document_mask


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
    """Returns None: any call will do."""
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
    """O = (2A - A @ A) @ value, with time and memory of batch * heads * seq^3 and seq^2. See `twicing_attention`."""
    batch, heads, seq, _ = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    logits = query @ key.mT * scale  # (batch, heads, seq, seq), as all below
    if attn_mask is not None and attn_mask.is_floating_point():
        logits = logits + attn_mask
    elif attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    if is_causal:
        logits = logits.masked_fill(logits.new_ones(seq, seq, dtype=torch.bool).triu(1), -torch.inf)
    if cu_seqlens is not None:
        logits = logits.masked_fill(~document_mask(cu_seqlens, batch, seq), -torch.inf)

    weights = F.dropout(_softmax(logits), dropout_p)
    return (2 * weights - weights @ weights) @ value


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; a row of -inf alone gives zeros instead of NaN, and no gradient."""
    nothing = logits.isneginf().all(dim=-1, keepdim=True)
    return logits.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
