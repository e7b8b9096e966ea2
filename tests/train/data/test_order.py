import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import LanguageConfig
from train.data.order import (
    DataOrder,
    check_world_size,
    permutation,
    rank_numbers,
    sample_hash,
    splitmix64,
    validation_numbers,
)

shard_sizes = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 12)
orders = st.builds(
    DataOrder, shard_sizes, st.sampled_from([1, 4, 6, 12]), st.integers(1, 9), st.integers(-(2**70), 2**70)
)


def epoch_ids(order: DataOrder, epoch: int) -> np.ndarray:
    return order.sample_ids(epoch * order.samples_per_epoch + np.arange(order.samples_per_epoch))


@given(orders, st.integers(0, 1000))
def test_an_epoch_has_every_sample_at_most_once_and_all_but_t_mod_l(order, epoch):
    ids = epoch_ids(order, epoch)
    assert len(np.unique(ids)) == len(ids) == order.samples - order.samples % order.lanes
    assert ids.min() >= 0 and ids.max() < order.samples


def test_the_samples_left_out_differ_between_epochs():
    order = DataOrder([23, 24], lanes=12, shuffle_block=4, seed=1)
    left_out = [frozenset(range(47)) - frozenset(epoch_ids(order, epoch).tolist()) for epoch in range(20)]
    assert all(len(ids) == 47 % 12 for ids in left_out)
    assert len(set(left_out)) > 10
    assert frozenset.union(*left_out) == frozenset(range(47)), "some samples are never left out"


@given(orders, st.data())
def test_ids_do_not_depend_on_what_was_asked_before(order, data):
    fresh = DataOrder(order._sizes, order.lanes, order._shuffle_block, order._seed)
    numbers = data.draw(st.lists(st.integers(0, 5 * order.samples), min_size=1, max_size=40))
    together = order.sample_ids(np.array(numbers))
    assert together.tolist() == [int(fresh.sample_ids(np.array([n]))[0]) for n in numbers]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 12, 36, 480])
def test_global_batches_are_the_same_at_any_world_size(world_size, start):
    order = DataOrder([40, 61, 7], lanes=12, shuffle_block=3, seed=5)
    batch, micro, steps = 24, 2, 9
    micro_batches = batch // (micro * world_size)
    for step in range(steps):
        numbers = np.concatenate(
            [
                rank_numbers(start + j * micro * world_size, rank, world_size, micro)
                for rank in range(world_size)
                for j in range(step * micro_batches, (step + 1) * micro_batches)
            ]
        )
        expected = start + step * batch + np.arange(batch)
        assert sorted(numbers.tolist()) == expected.tolist()
        fresh = DataOrder([40, 61, 7], lanes=12, shuffle_block=3, seed=5)
        assert fresh.sample_ids(np.sort(numbers)).tolist() == order.sample_ids(expected).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_rank_reads_only_its_own_lanes_and_remembers_one_block_for_each(world_size):
    order = DataOrder([500], lanes=12, shuffle_block=8, seed=2)
    order.sample_ids(rank_numbers(0, world_size - 1, world_size, 2000))
    assert sorted(order._blocks) == list(range(world_size - 1, 12, world_size))
    assert all(len(block) <= 8 for _, _, block in order._blocks.values())


def test_shuffle_block_1_keeps_the_order_inside_lanes():
    order = DataOrder([120], lanes=12, shuffle_block=1, seed=3)
    lanes = epoch_ids(order, 0).reshape(-1, 12).T
    assert all(np.all(np.diff(lane) % 120 == 1) for lane in lanes)
    assert order._blocks == {}


def test_shuffling_permutes_inside_blocks_only():
    plain, shuffled = (DataOrder([240], lanes=12, shuffle_block=s, seed=3) for s in (1, 5))
    a, b = (epoch_ids(order, 1).reshape(4, 5, 12) for order in (plain, shuffled))  # (block, within, lane)
    assert not np.array_equal(a, b)
    assert np.array_equal(np.sort(a, axis=1), np.sort(b, axis=1))


def test_shards_are_laid_out_in_another_order_each_epoch():
    order = DataOrder([10, 20, 30, 40], lanes=1, shuffle_block=1, seed=7)
    first_ids = np.array([0, 10, 30, 60])

    def shards(epoch: int) -> tuple[int, ...]:
        visited = np.searchsorted(first_ids, epoch_ids(order, epoch), side="right") - 1
        changes = visited[np.flatnonzero(np.diff(visited, prepend=-1))]
        return tuple(dict.fromkeys(changes.tolist()))

    assert len({shards(epoch) for epoch in range(20)}) > 8


GOLDEN_IDS = [13, 0, 5, 7, 14, 2, 6, 21, 15, 1, 18, 22, 17, 4, 20, 8, 16, 3, 19, 9]
GOLDEN_PERMUTATION = [7, 1, 0, 3, 4, 6, 5, 2]


def test_the_order_never_changes_between_versions():
    order = DataOrder([7, 11, 5], lanes=4, shuffle_block=3, seed=42)
    assert order.sample_ids(np.arange(20)).tolist() == GOLDEN_IDS
    assert permutation(8, 42, 1).tolist() == GOLDEN_PERMUTATION
    # first output of the published generator seeded with 0
    assert splitmix64(np.zeros(1, dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF]


def test_seeds_give_different_orders():
    first = [epoch_ids(DataOrder([100], 4, 8, seed), 0).tolist() for seed in range(5)]
    assert len({tuple(ids) for ids in first}) == 5


def test_fewer_samples_than_lanes_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"data.lanes is 12, but the data set has only 11 samples"):
        DataOrder([5, 6], lanes=12, shuffle_block=1, seed=0)


@given(st.integers(1, 100), st.integers(1, 5), st.integers(1, 7))
def test_validation_has_every_sample_once_and_equal_steps(samples, world_size, micro):
    parts = [validation_numbers(samples, rank, world_size, micro) for rank in range(world_size)]
    assert len({part.shape for part in parts}) == 1
    steps = parts[0].shape[0]
    assert (steps - 1) * micro * world_size < samples <= steps * micro * world_size
    together = np.concatenate([part.ravel() for part in parts])
    assert sorted(together[together < samples].tolist()) == list(range(samples))
    assert all(np.all(np.diff(part.ravel()) > 0) for part in parts)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50), st.integers(0, 50), st.randoms())
def test_sample_hash_adds_up_over_parts_in_any_order(ids, cut, draw):
    shuffled = list(ids)
    draw.shuffle(shuffled)
    parts = [sample_hash(np.array(part, dtype=np.int64)) for part in (shuffled[:cut], shuffled[cut:])]
    wrapped = (sum(parts) + 2**63) % 2**64 - 2**63
    assert wrapped == sample_hash(np.array(ids, dtype=np.int64))
    assert sample_hash(np.array([*ids, 0])) != wrapped


@pytest.mark.parametrize(
    ("world_size", "micro", "message"),
    [
        (8, None, r"data.lanes is 12; .* 8"),
        (3, None, r"train.global_batch_size is 16; .* 3"),
        (2, 3, r"train.micro_batch_size is 3; .* one of 1, 2, 4, 8$"),
        (4, 16, r"train.micro_batch_size is 16; .* one of 1, 2, 4$"),
    ],
    ids=["lanes", "global-batch", "micro-batch", "micro-batch-too-large"],
)
def test_check_world_size_names_the_key(world_size, micro, message):
    config = LanguageConfig()
    config.data.lanes, config.train.global_batch_size, config.train.micro_batch_size = 12, 16, micro
    with pytest.raises(ValueError, match=message):
        check_world_size(config, world_size)


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (3, r"train.sequence_parallel_size is 2; it must divide the number of ranks, 3$"),
        (16, r"data.lanes is 12; .* the number of ranks over train.sequence_parallel_size, 16 / 2 = 8$"),
    ],
)
def test_ranks_that_share_rows_count_as_one(world_size, message):
    config = LanguageConfig()
    config.data.lanes, config.train.global_batch_size, config.train.sequence_parallel_size = 12, 16, 2
    for accepted in (2, 4, 8):  # 8 alone would not divide 12 lanes
        check_world_size(config, accepted)
    with pytest.raises(ValueError, match=message):
        check_world_size(config, world_size)


def test_check_world_size_accepts_what_divides():
    config = LanguageConfig()
    config.data.lanes, config.train.global_batch_size, config.train.micro_batch_size = 12, 16, 2
    for world_size in (1, 2, 4):
        check_world_size(config, world_size)
