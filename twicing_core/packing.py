"""Attention over rows that hold several documents, none of which may see another.

A mask for that is seq x seq. `attend_packed` needs none: it gathers the documents into batches of similar length,
attends in each, and puts the results back.

Shapes: B batch, N positions a row, T any number of tokens, H heads, D head_dim; M documents of L positions in a bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def attend_packed(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, is_causal: bool
) -> Tensor:
    """Applies an attention function to each document by itself.

    Documents are padded at their end to the longest of their bucket, and a bucket takes lengths that differ by less
    than a factor of two: O(batch * seq * head_dim) memory, and at most ceil(log2(seq)) + 1 calls of `attend`.
    With `cu_seqlens` on a CUDA device this waits for the device once, to read the lengths.
    Under `torch.compile`, where shapes must not depend on values, it is one call with a (batch, 1, seq, seq) mask.

    Args:
        attend: called as ``attend(query, key, value, attn_mask=..., is_causal=...)``, with the meaning and shapes of
            `torch.nn.functional.scaled_dot_product_attention`: `attn_mask` is bool, (M, 1, 1, L) or, under
            `torch.compile`, (batch, 1, seq, seq), or None. Returns the shape of `query`.
        query: (batch, heads, seq, head_dim).
        key, value: (batch, key_heads, seq, head_dim); `key_heads` may be any that `attend` takes.
        cu_seqlens: (documents + 1,) int32, as in `twicing_attention`.
        is_causal: position i attends to positions j <= i of its document only.

    Returns:
        (batch, heads, seq, head_dim).
    """
    batch, _, seq, _ = query.shape
    if not values_are_readable(cu_seqlens):
        same_document = document_mask(cu_seqlens, batch, seq)
        mask = same_document.tril() if is_causal else same_document
        return attend(query, key, value, attn_mask=mask, is_causal=False)

    buckets, position_T, slot_T = _buckets(cu_seqlens)
    # One gather for all buckets, and index_select instead of indexing: the backward of either is several times faster.
    padded = [tensor.transpose(1, 2).flatten(0, 1).index_select(0, position_T) for tensor in (query, key, value)]
    sizes = [bucket.documents * bucket.longest for bucket in buckets]
    outputs = []
    for bucket, *parts in zip(buckets, *(tensor.split(sizes) for tensor in padded), strict=True):
        qkv_MHLD = (part.unflatten(0, (bucket.documents, bucket.longest)).transpose(1, 2) for part in parts)
        # Padding comes last, so no document's own position is after it: causal attention needs no mask.
        key_mask = None if is_causal or bucket.real_ML is None else bucket.real_ML[:, None, None, :]
        output_MHLD = attend(*qkv_MHLD, attn_mask=key_mask, is_causal=is_causal)
        outputs.append(output_MHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, slot_T).unflatten(0, (batch, seq)).transpose(1, 2)


def document_mask(cu_seqlens: Tensor, batch: int, seq: int) -> Tensor:
    """Returns (batch, 1, seq, seq) bool: True where two positions of a row are of the same document."""
    position = torch.arange(batch * seq, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document_BN = torch.searchsorted(cu_seqlens, position, right=True).view(batch, 1, seq)
    return document_BN[..., :, None] == document_BN[..., None, :]


def values_are_readable(tensor: Tensor) -> bool:
    """Whether Python may branch on the values: not while compiling, nor of fake and meta tensors, which have none."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and not tensor.is_meta


class _Bucket(NamedTuple):
    """Documents of similar length, padded at their end to the longest."""

    documents: int
    longest: int
    real_ML: Tensor | None  # bool, False for padding; None if there is none


def _buckets(cu_seqlens: Tensor) -> tuple[list[_Bucket], Tensor, Tensor]:
    """Sorts documents into buckets, all before attention starts, so that the device is waited for once.

    Returns:
        The buckets; the positions of their tokens, bucket after bucket, where padding repeats its own document's last
        token, so that a NaN stays in its document; and for each of the B*N positions, where it is in that sequence.
    """
    similar = defaultdict(list)
    for start, end in pairwise(cu_seqlens.tolist()):
        if start < end:
            similar[(end - start - 1).bit_length()].append((start, end - start))

    device = cu_seqlens.device
    buckets, positions, reals = [], [], []
    for documents in similar.values():
        start_M1, length_M1 = torch.tensor(documents).unsqueeze(-1).unbind(1)
        offset_L = torch.arange(int(length_M1.max()))
        real_ML = offset_L < length_M1
        buckets.append(_Bucket(len(documents), len(offset_L), None if real_ML.all() else real_ML.to(device)))
        positions.append((start_M1 + offset_L.minimum(length_M1 - 1)).flatten())
        reals.append(real_ML.flatten())

    position_T = torch.cat(positions)
    real_slot_T = torch.cat(reals).nonzero().squeeze(1)
    slot_T = torch.empty_like(real_slot_T).index_copy_(0, position_T[real_slot_T], real_slot_T)
    return buckets, position_T.to(device), slot_T.to(device)
