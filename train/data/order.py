"""Which sample is number n of a run: pure arithmetic on integers, no I/O, no state to save.

    n        global sample number 0, 1, 2, ... over the whole run
    W        data-parallel size, the ranks over train.sequence_parallel_size; divides L and the global batch size
    L        lanes
    S        samples permuted together inside a lane (shuffle_block)
    T        samples in the data set; E = L * (T // L) of them are used in an epoch
    epoch    n // E;   lane = n % L;   position = (n % E) // L

The sequence of an epoch is the shards in a permuted order, laid end to end and rotated by a random offset, so that the
T mod L samples left out differ from epoch to epoch. Lane l is the l-th stretch of T // L samples of that sequence;
inside it, blocks of S samples are permuted. Rank r takes the n congruent to r modulo W. Since all of this depends on n
and the seed alone, a run that stopped at n continues at n on any W, and sees the same global batches.

Permutations sort by a hash (splitmix64, Steele, Lea & Flood 2014) instead of drawing from a random generator: the
streams of library generators may change between versions, and a resumed run must never see another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from train.config import AnyConfig

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
# What a hash is used for is part of its key, so that no two uses share random numbers.
_SHARDS, _ROTATION, _BLOCK, _DRAW = range(4)


def splitmix64(values: UInt64Array) -> UInt64Array:
    """A bijection of 64-bit integers that looks random; uint64 in, uint64 out, any shape."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_key(*parts: int) -> int:
    """A 64-bit hash of a tuple of integers: the same function as `splitmix64`, chained, on Python integers."""
    state = 0
    for part in parts:
        x = ((state ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        state = x ^ (x >> 31)
    return state


def permutation(size: int, *key: int) -> Int64Array:
    """A permutation of range(size), (size,) int64, that depends on the integers in `key` alone."""
    # splitmix64 is a bijection, so no two elements tie and every sorting algorithm gives the same result.
    return np.argsort(splitmix64(np.arange(size, dtype=np.uint64) ^ np.uint64(hash_key(*key))))


def draw_seed(seed: int, n: int) -> int:
    """The 64-bit seed from which sample number `n` draws its augmentation."""
    return hash_key(seed, _DRAW, n)


def sample_hash(ids: Int64Array) -> int:
    """A hash of a multiset of sample ids, whatever their order: hashes of parts add up (as wrapping int64).

    Returns:
        a signed 64-bit integer, so that torch can all-reduce it with a sum that wraps around.
    """
    total = int(splitmix64(ids.astype(np.uint64) + np.uint64(1)).sum(dtype=np.uint64))
    return total - (1 << 64) if total >> 63 else total


def rank_numbers(first_n: int, rank: int, world_size: int, count: int) -> Int64Array:
    """The first `count` numbers n >= `first_n` that belong to `rank`: n = rank (mod world_size). (count,) int64.

    Micro-batch j of a rank in a run that starts at n0 is `rank_numbers(n0 + j * micro * W, rank, W, micro)`: over all
    ranks, the micro-batches of a step cover the global batch [n0, n0 + B) exactly.
    """
    start = first_n + (rank - first_n) % world_size
    return start + world_size * np.arange(count, dtype=np.int64)


def validation_numbers(samples: int, rank: int, world_size: int, micro_batch: int) -> Int64Array:
    """(steps, micro_batch) int64: what a rank validates, in natural order and in equal steps on every rank.

    Over all ranks every number in [0, samples) occurs exactly once; numbers >= `samples` are padding, to weigh 0.
    """
    steps = -(-samples // (micro_batch * world_size))
    return rank_numbers(0, rank, world_size, steps * micro_batch).reshape(steps, micro_batch)


def check_world_size(config: AnyConfig, world_size: int) -> None:
    """Raises ValueError, naming the key, if `config` can't be trained by `world_size` ranks."""
    lanes, batch, shared = config.data.lanes, config.train.global_batch_size, config.train.sequence_parallel_size
    if world_size % shared:
        raise ValueError(f"train.sequence_parallel_size is {shared}; it must divide the number of ranks, {world_size}")
    size = data_parallel_size(config, world_size)
    ranks = f"the number of ranks, {size}"
    if shared > 1:
        ranks = f"the number of ranks over train.sequence_parallel_size, {world_size} / {shared} = {size}"
    if lanes % size:
        raise ValueError(f"data.lanes is {lanes}; it must be a multiple of {ranks}")
    if batch % size:
        raise ValueError(f"train.global_batch_size is {batch}; it must be a multiple of {ranks}")
    micro = micro_batch_size(config, world_size)
    if batch % (micro * size):
        allowed = [m for m in range(1, batch // size + 1) if batch // size % m == 0]
        raise ValueError(
            f"train.micro_batch_size is {micro}; with train.global_batch_size {batch} on {world_size} ranks it must "
            f"be one of {', '.join(map(str, allowed))}"
        )


def data_parallel_size(config: AnyConfig, world_size: int) -> int:
    """W for `world_size` ranks: those that share their rows count as one."""
    return world_size // config.train.sequence_parallel_size


def micro_batch_size(config: AnyConfig, world_size: int) -> int:
    """Samples that each of `world_size` ranks takes, or takes its part of, in one forward pass."""
    return config.train.micro_batch_size or config.train.global_batch_size // data_parallel_size(config, world_size)


class DataOrder:
    """The order of training: global sample number -> id of a sample in the natural order of the data set.

    Memory: one permutation of `shuffle_block` integers for each lane asked for, so O(L / W * S) on a rank.

    Args:
        shard_sizes: samples of each shard, in natural order.
        lanes: L.
        shuffle_block: S; 1 keeps the order of samples inside their shard.
        seed: chooses the permutations.

    Raises:
        ValueError: there are fewer samples than lanes.
    """

    def __init__(self, shard_sizes: Sequence[int], lanes: int, shuffle_block: int, seed: int):
        assert lanes > 0 and shuffle_block > 0
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first_ids = np.cumsum(self._sizes) - self._sizes
        self.samples = int(self._sizes.sum())
        if self.samples < lanes:
            raise ValueError(
                f"data.lanes is {lanes}, but the data set has only {self.samples} samples; it must have at least one "
                "a lane: lower data.lanes or prepare more data"
            )
        self.lanes = lanes
        self.lane_length = self.samples // lanes
        self.samples_per_epoch = lanes * self.lane_length
        self._shuffle_block = shuffle_block
        self._seed = seed
        self._sequences: dict[int, tuple[Int64Array, Int64Array, int]] = {}  # of the last two epochs asked for
        self._blocks: dict[int, tuple[int, int, Int64Array]] = {}  # lane -> epoch, block, its permutation

    def sample_ids(self, n: Int64Array) -> Int64Array:
        """The ids of samples number `n`: int64 of any shape in, int64 of that shape out."""
        epoch, in_epoch = np.divmod(n, self.samples_per_epoch)
        position, lane = np.divmod(in_epoch, self.lanes)
        place = lane * self.lane_length + self._shuffled(epoch, lane, position)  # in the sequence of the epoch
        ids = np.empty_like(n)
        for e in np.unique(epoch):
            of_epoch = epoch == e
            ids[of_epoch] = self._ids_in_sequence(int(e), place[of_epoch])
        return ids

    def _ids_in_sequence(self, epoch: int, place: Int64Array) -> Int64Array:
        """Sample ids at places of an epoch's sequence of shards."""
        if epoch not in self._sequences:
            while len(self._sequences) > 1:
                del self._sequences[min(self._sequences)]
            shards = permutation(len(self._sizes), self._seed, _SHARDS, epoch)
            rotation = hash_key(self._seed, _ROTATION, epoch) % self.samples
            self._sequences[epoch] = shards, np.cumsum(self._sizes[shards]), rotation
        shards, ends, rotation = self._sequences[epoch]
        place = (place + rotation) % self.samples
        which = np.searchsorted(ends, place, side="right")
        shard = shards[which]
        return self._first_ids[shard] + place - (ends[which] - self._sizes[shard])

    def _shuffled(self, epoch: Int64Array, lane: Int64Array, position: Int64Array) -> Int64Array:
        """Positions inside lanes after the blocks of S have been permuted."""
        if self._shuffle_block == 1:
            return position
        block, within = np.divmod(position, self._shuffle_block)
        queries = (array.ravel().tolist() for array in (epoch, lane, block, within))
        moved = [self._block_permutation(*key)[i] for *key, i in zip(*queries, strict=True)]
        return block * self._shuffle_block + np.array(moved, dtype=np.int64).reshape(within.shape)

    def _block_permutation(self, epoch: int, lane: int, block: int) -> Int64Array:
        cached = self._blocks.get(lane)
        if cached is None or cached[:2] != (epoch, block):
            size = min(self._shuffle_block, self.lane_length - block * self._shuffle_block)
            cached = epoch, block, permutation(size, self._seed, _BLOCK, epoch, lane, block)
            self._blocks[lane] = cached
        return cached[2]
