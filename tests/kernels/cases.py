"""Attention problems to verify kernels on, and their answers: in float64, and by torch in the kernel's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.nn import functional as F

from twicing_core import reference
from twicing_core.packing import document_mask

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
SEQS = (1, 63, 64, 65, 130, 197, 256, 257, 1000)
BATCH, HEADS = 2, 2


@dataclass(frozen=True)
class Case:
    """One problem. Inputs are normal, queries a little larger: attention is neither flat nor a choice of one."""

    dtype: str
    head_dim: int
    seq: int
    causal: bool = False
    grouped: bool = False  # one key head for the two query heads
    packed: bool = False  # rows hold documents
    query_scale: float = 1.5
    scale: float | None = None

    def __str__(self) -> str:
        flags = [name for name in ("causal", "grouped", "packed") if getattr(self, name)]
        return "-".join([self.dtype, f"d{self.head_dim}", f"n{self.seq}", *flags])

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value, (batch, heads, seq, head_dim)."""
        random = torch.Generator().manual_seed(self.seq * 1000 + self.head_dim)
        key_heads = 1 if self.grouped else HEADS
        shapes = [(BATCH, heads, self.seq, self.head_dim) for heads in (HEADS, key_heads, key_heads)]
        query, key, value = (torch.randn(shape, generator=random) for shape in shapes)
        dtype = DTYPES[self.dtype]
        return (query * self.query_scale).to(dtype), key.to(dtype), value.to(dtype)

    @cached_property
    def grad_output(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seq)
        return torch.randn(self.inputs[0].shape, generator=random).to(DTYPES[self.dtype])

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """Documents of 1, 2, 4, ... tokens at the start of each row, the last to its end."""
        if not self.packed:
            return None
        lengths = [2**i for i in range(20) if 2 ** (i + 1) < self.seq] if self.seq > 1 else []
        starts = torch.tensor([0, *lengths]).cumsum(0)
        offsets = [row * self.seq + starts for row in range(BATCH)]
        return torch.cat([*offsets, torch.tensor([BATCH * self.seq])]).int()

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def arguments(self) -> dict[str, object]:
        return {"is_causal": self.causal, "scale": self.scale, "cu_seqlens": self.cu_seqlens}

    def expected(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The definition."""
        arguments = {"is_causal": self.causal, "scale": self.logit_scale, "cu_seqlens": self.cu_seqlens}
        return reference.attend(query, key, value, attn_mask=None, dropout_p=0.0, **arguments)

    def by_torch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same formula as two calls of torch's attention, in the inputs' dtype."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        mask = torch.ones(self.seq, self.seq, dtype=torch.bool).tril() if self.causal else None
        if self.cu_seqlens is not None:
            documents = document_mask(self.cu_seqlens, BATCH, self.seq)
            mask = documents if mask is None else documents & mask
        u = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.logit_scale)
        return 2 * u - F.scaled_dot_product_attention(query, key, u, attn_mask=mask, scale=self.logit_scale)


def fits_short(case: Case) -> bool:
    """Whether the short kernels take it."""
    return case.head_dim <= 64 and case.seq <= 256


def every_case() -> list[Case]:
    """The whole product."""
    flags = (False, True)
    return [Case(*values) for values in product(DTYPES, HEAD_DIMS, SEQS, flags, flags, flags)]


def pairwise_cases(pool: list[Case]) -> list[Case]:
    """A small part of the pool in which every two values of different fields that meet in the pool still meet."""

    def pairs(case: Case) -> set[tuple[tuple[int, object], ...]]:
        values = (case.dtype, case.head_dim, case.seq, case.causal, case.grouped, case.packed)
        indexed = list(enumerate(values))
        return {(a, b) for a, b in product(indexed, indexed) if a[0] < b[0]}

    chosen: list[Case] = []
    missing = set().union(*map(pairs, pool))
    while missing:
        best = max(pool, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().max().item()


def documents_of(case: Case) -> list[tuple[int, int]]:
    assert case.cu_seqlens is not None
    return list(pairwise(case.cu_seqlens.tolist()))
