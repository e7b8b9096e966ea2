"""Softmax attention with the very parameters of twicing attention, so that a baseline is one setting away.

And what `auto` means for a model.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from train.config import LanguageModelConfig, VisionModelConfig
from twicing_core import TwicingAttention
from twicing_core.attention import BACKENDS
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


def backend_in_use(model: LanguageModelConfig | VisionModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that the model's twicing layers take on `device`, which need not be here: never `auto`."""
    if model.attention_backend != "auto":
        return model.attention_backend
    with FakeTensorMode():
        query = torch.empty(1, model.heads, 1, model.width // model.heads, dtype=dtype, device=device)
    able = [
        name
        for name, backend in BACKENDS.items()
        if backend.refusal(query, attn_mask=None, cu_seqlens=None, dropout_p=0.0) is None
    ]
    return able[0]
