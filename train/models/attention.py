"""Softmax attention with the very parameters of twicing attention, so that a baseline is one setting away."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from twicing_core import TwicingAttention
from twicing_core.packing import attend_packed


class SoftmaxAttention(TwicingAttention):
    """`TwicingAttention` with A·V in place of (2A - A²)·V; same arguments, parameters and initial values."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor:
        attention = partial(F.scaled_dot_product_attention, enable_gqa=self.num_kv_heads != self.num_heads)
        if cu_seqlens is None:
            return attention(query, key, value, attn_mask=attn_mask, is_causal=self.is_causal)
        return attend_packed(attention, query, key, value, cu_seqlens, self.is_causal)
