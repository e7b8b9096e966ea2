"""Softmax attention with the very parameters of twicing attention, so that a baseline is one setting away.

And what `auto` means for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from train.config import LanguageModelConfig, VisionModelConfig
from twicing_core import TwicingAttention, fused, preferences
from twicing_core.attention import BACKENDS
from twicing_core.packing import attend_packed


class SharedRows(Protocol):
    """Rows that several ranks share, each with a slice of their positions."""

    def positions(self, length: int) -> slice:
        """This rank's positions of a row of `length`."""

    def attend(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor:
        """`attend(query, key, value, **arguments)` over whole rows, from and to this rank's slices of them."""


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
    """The backend that the model's twicing layers take when they train on `device`, which is here: never `auto`."""
    if model.attention_backend != "auto":
        return model.attention_backend
    causal = isinstance(model, LanguageModelConfig)
    with FakeTensorMode():
        shape = (1, model.heads, _tokens(model), model.width // model.heads)
        query = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
        # Text comes as packed documents.
        cu_seqlens = torch.empty(2, dtype=torch.int32, device=device) if causal else None
    call: dict[str, Any] = dict(is_causal=causal, scale=1.0, attn_mask=None, cu_seqlens=cu_seqlens, dropout_p=0.0)
    able = [n for n, b in BACKENDS.items() if b.refusal(query, query, query, **call, auto=True) is None]
    return able[0]


def planned_backend(
    model: LanguageModelConfig | VisionModelConfig, capability: tuple[int, int], dtype: torch.dtype
) -> str:
    """As `backend_in_use`, on a GPU of this compute capability that need not be here, its kernels compiled and untimed."""
    if model.attention_backend != "auto":
        return model.attention_backend
    head_dim = model.width // model.heads
    if dtype not in fused.DTYPES["cuda"] or head_dim not in fused.HEAD_DIMS or head_dim > fused.CUDA_BACKWARD_HEAD_DIM:
        return "composed"
    if isinstance(model, LanguageModelConfig):
        return "fused"  # of packed documents it is always preferred
    regime = preferences.regime(_tokens(model), head_dim, is_causal=False)
    return "composed" if preferences.guess(capability)[regime].training == preferences.COMPOSED else "fused"


def _tokens(model: LanguageModelConfig | VisionModelConfig) -> int:
    if isinstance(model, LanguageModelConfig):
        return model.sequence_length
    return (model.image_size // model.patch_size) ** 2 + 1  # patches and the class token
