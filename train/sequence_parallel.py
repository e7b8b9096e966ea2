"""Ulysses sequence parallelism (arXiv:2309.14509): S ranks share every row, each with its slice of the positions.

All layers but attention work on a rank's own slice. Attention needs whole rows, but its heads need nothing of each other:
DeepSpeed's `DistributedAttention` exchanges, between the ranks of a group, slices of all heads for whole rows of some heads,
and back: four all-to-alls a layer (queries, keys, values, outputs), and four more for their gradients.

Ranks g·S to g·S+S-1 are group g, next to each other, so that a group stays on one host where it can. They read the same
samples, and each sums the losses of its own targets.

ZeRO need not know of it: the loss is a sum over targets, whose gradients it averages over all ranks as ever, and it
partitions over all ranks as ever. So DeepSpeed gets no `mpu`, which would make it average over groups instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from train.config import AnyConfig


class SequenceParallel:
    """This rank's part in its group's rows: the `SharedRows` that the models take. Every rank must make one.

    Args:
        size: S, ranks that share a row; a divisor of the number of ranks.
    """

    def __init__(self, size: int) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        group, _ = dist.new_subgroups(size)
        self._size, self._rank = size, dist.get_rank(group)
        # It takes (batch, seq, heads, head_dim): dimension 2 is scattered over the ranks, 1 gathered from them.
        self._exchange = DistributedAttention(_attend_heads, group, scatter_idx=2, gather_idx=1)

    def positions(self, length: int) -> slice:
        """This rank's positions of a row of `length`, which S divides."""
        own = length // self._size
        return slice(self._rank * own, (self._rank + 1) * own)

    def attend(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> Tensor:
        """`attend(query, key, value, **arguments)` over whole rows, of tensors that are this rank's slices of them.

        Args:
            attend: called with the whole rows and with heads / S heads; `arguments` must be those of whole rows.
            query: (batch, heads, seq / S, head_dim).
            key, value: (batch, key_heads, seq / S, head_dim); S divides both numbers of heads.

        Returns:
            (batch, heads, seq / S, head_dim).
        """
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        batch_dimension, no_rotary = 0, None
        return self._exchange(query, key, value, batch_dimension, no_rotary, attend, **arguments).transpose(1, 2)


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Tensor], **arguments: Any) -> Tensor:
    """`attend` for tensors laid out as DeepSpeed has them, (batch, seq, heads, head_dim)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attend(query, key, value, **arguments).transpose(1, 2)


def start(config: AnyConfig) -> SequenceParallel | None:
    """What `train.sequence_parallel_size` asks for, with the process group already joined; None for 1."""
    size = config.train.sequence_parallel_size
    return SequenceParallel(size) if size > 1 else None
