"""What `twicing_core.bench` compares: ways to compute twicing attention, plain attention, and the shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from twicing_core.attention import twicing_attention

Attention = Callable[..., Tensor]


class Shape(NamedTuple):
    batch: int
    heads: int
    seq: int
    head_dim: int
    is_causal: bool

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.seq}x{self.head_dim} {'causal' if self.is_causal else 'full'}"


SHAPES = {
    "vit-tiny": Shape(16, 3, 197, 64, False),
    "wikitext": Shape(16, 8, 256, 16, True),
    "1k": Shape(1, 8, 1024, 64, True),
    "2k": Shape(1, 4, 2048, 64, True),
    "4k": Shape(1, 4, 4096, 64, True),
    "8k": Shape(1, 2, 8192, 64, True),
    "2k-full": Shape(1, 4, 2048, 64, False),
}
CUDA_SHAPES = {
    "vit-base": Shape(64, 12, 197, 64, False),
    "wikitext": Shape(64, 8, 256, 16, True),
    "gpt2": Shape(16, 12, 1024, 64, True),
    "2k": Shape(8, 16, 2048, 128, True),
    "8k": Shape(2, 16, 8192, 128, True),
    "2k-full": Shape(8, 16, 2048, 128, False),
    "8k-full": Shape(2, 16, 8192, 64, False),
}
LONGEST_MATERIALISED = 1024  # A of a head is seq x seq, and autograd keeps several of them


def _attention_matrix(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        logits = logits.masked_fill(logits.new_ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(dim=-1)


def a_squared(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The published code for language: (2A - A @ A) @ V."""
    weights = _attention_matrix(query, key, is_causal)
    return (2 * weights - weights @ weights) @ value


def residual(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """The published code for vision: AV + A(V - AV), with A kept."""
    weights = _attention_matrix(query, key, is_causal)
    smooth = weights @ value
    return smooth + weights @ (value - smooth)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """ONE call of torch's attention, which is what a transformer without twicing pays."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _by(backend: SDPBackend, attention: Attention) -> Attention:
    """The same, with one of torch's kernels."""

    def attend(*args: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return attention(*args, **options)

    return attend


CANDIDATES: dict[str, Attention] = {
    "fused": partial(twicing_attention, backend="fused"),
    "composed": partial(twicing_attention, backend="composed"),
    "reference": partial(twicing_attention, backend="reference"),
    "2A-AA": a_squared,
    "A(V-AV)": residual,
    "one SDPA": plain_attention,
}
CUDA_CANDIDATES: dict[str, Attention] = CANDIDATES | {
    "2 flash": _by(SDPBackend.FLASH_ATTENTION, CANDIDATES["composed"]),
    "2 cuDNN": _by(SDPBackend.CUDNN_ATTENTION, CANDIDATES["composed"]),
    "one flash": _by(SDPBackend.FLASH_ATTENTION, plain_attention),
    "one cuDNN": _by(SDPBackend.CUDNN_ATTENTION, plain_attention),
}
MATERIALISED = ("reference", "2A-AA", "A(V-AV)")
