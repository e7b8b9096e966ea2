"""Softmax attention with the very parameters of twicing attention, so that a baseline is one setting away.

And what `auto` means for a model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from train.config import LanguageModelConfig, VisionModelConfig
from twicing_core import TwicingAttention
from twicing_core.attention import choose
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
        call: dict[str, Any] = {"scale": 1.0, "attn_mask": None, "dropout_p": 0.0}
        if isinstance(model, LanguageModelConfig):  # whose rows are packed
            seq = model.sequence_length
            call |= {"is_causal": True, "cu_seqlens": torch.empty(2, dtype=torch.int32, device=device)}
        else:
            seq = (model.image_size // model.patch_size) ** 2 + 1
            call |= {"is_causal": False, "cu_seqlens": None}
        query = torch.empty(1, model.heads, seq, model.width // model.heads, dtype=dtype, device=device)
        return choose("auto", query.requires_grad_(), query, query, call)[0]
