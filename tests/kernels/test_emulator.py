"""The emulator itself: each instruction against the PTX ISA's tables, and each mistake it must notice."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import emulated
import numpy as np
import pytest

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # "groupID" and "threadID_in_group" in the PTX ISA


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated.build("probes.cpp")))
    library.emulator_log.restype = ctypes.c_char_p
    library.emulator_counters.restype = ctypes.POINTER(emulated.Counters)
    return library


@pytest.fixture
def probe(library: ctypes.CDLL) -> Callable[..., str]:
    """Calls a probe with arrays and numbers, and returns what the emulator has to say."""

    def call(
        name: str,
        *arguments: object,
        seed: int = 0,
        resident: int = 1,
        buffers: dict[str, tuple[np.ndarray, bool]] | None = None,
    ) -> str:
        library.emulator_reset(ctypes.c_uint32(seed), ctypes.c_bool(False), resident)
        for buffer, (array, writable) in (buffers or {}).items():
            address, size = array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes)
            library.emulator_buffer(buffer.encode(), address, size, ctypes.c_bool(writable), ctypes.c_bool(False))
        getattr(library, name)(*(as_c(argument) for argument in arguments))
        return library.emulator_log().decode()

    return call


def as_c(argument: object) -> object:
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data_as(ctypes.c_void_p)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


@pytest.mark.parametrize(("pending", "group", "complaint"), [(0, 1, False), (1, 0, False), (1, 1, True)])
def test_cp_async_may_be_read_only_after_its_wait(
    probe: Callable[..., str], pending: int, group: int, complaint: bool
) -> None:
    source = np.zeros(32, np.uint32)
    log = probe("probe_cp_async_groups", source, pending, group, buffers={"source": (source, False)})
    assert ("copy in flight" in log) == complaint
    # The neighbouring lane's half of the pair: this lane's wait says nothing of it.
    assert complaint or "read after write" in log


@pytest.mark.parametrize("read_first", [False, True], ids=["read_after_write", "write_after_read"])
@pytest.mark.parametrize(
    ("threads", "barrier", "complaint"),
    [(32, 0, False), (32, 2, False), (32, 1, True), (64, 0, False), (64, 2, True), (64, 1, True)],
    ids=["warp-block", "warp-warp", "warp-none", "block-block", "block-warp", "block-none"],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_races_are_seen_on_any_schedule(
    probe: Callable[..., str], threads: int, barrier: int, complaint: bool, read_first: bool, seed: int
) -> None:
    log = probe("probe_barrier", threads, barrier, read_first, seed=seed)
    assert ("without a barrier between" in log) == complaint


MISTAKES = {
    "unwritten": "nobody wrote",
    "outside": "outside of shared",
    "misaligned": "misaligned",
    "global_outside": "outside of all buffers",
    "global_read_only": "only read",
    "global_unwritten": "nobody wrote",
    "global_race": "write after write",
    "deadlock": "deadlock",
    "divergence": "different instructions",
    "different_barriers": "different barriers",
    "copy_left": "copies in flight",
    "two_blocks": "write after write",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(probe: Callable[..., str], mistake: str) -> None:
    data, output = np.zeros(64, np.float32), np.zeros(64, np.float32)
    buffers = {"input": (data, False), "output": (output, True)}
    assert MISTAKES[mistake] in probe("probe_mistake", list(MISTAKES).index(mistake), data, output, buffers=buffers)


OMISSIONS = {
    "nothing": "",
    "release": "without release and acquire",
    "release_after_data": "without release and acquire",
    "barrier_before_release": "without release and acquire",
    "fence": "without release and acquire",
    "barrier_after_fence": "without release and acquire",
    "awaiting": "nobody wrote|without release and acquire",
    "reset": "nobody wrote",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("resident", [1, 2, 7])
@pytest.mark.parametrize("omitted", OMISSIONS)
def test_blocks_that_hand_on_results(probe: Callable[..., str], omitted: str, resident: int, seed: int) -> None:
    """Each step that orders one block's reads after another's writes is missed, on any schedule."""
    blocks = 7
    flags, data = np.zeros(1 + blocks, np.int32), np.full((blocks, 64), np.nan, np.float32)
    buffers = {"flags": (flags, True), "data": (data, True)}
    log = probe(
        "probe_chain",
        list(OMISSIONS).index(omitted),
        blocks,
        flags,
        data,
        seed=seed,
        resident=resident,
        buffers=buffers,
    )
    if omitted == "nothing":
        assert log == ""
        np.testing.assert_array_equal(data, np.array([[1, 2, 3, 4, 5, 6, 7]]).T * np.ones(64))
    else:
        assert re.search(OMISSIONS[omitted], log)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("resident", [1, 6, 7])
def test_deadlock_of_tickets_out_of_order(probe: Callable[..., str], resident: int, seed: int) -> None:
    """Blocks that wait for blocks that have not started: unless all are in flight."""
    flags, data = np.zeros(8, np.int32), np.zeros((7, 64), np.float32)
    buffers = {"flags": (flags, True), "data": (data, True)}
    log = probe("probe_chain", len(OMISSIONS), 7, flags, data, seed=seed, resident=resident, buffers=buffers)
    assert ("deadlock" in log) == (resident < 7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_store_is_held_back(probe: Callable[..., str], seed: int) -> None:
    data, seen = np.zeros(32, np.float32), np.full(32, np.nan, np.float32)
    assert probe("probe_held_back", data, seen, seed=seed, resident=2, buffers={"data": (data, True)}) != ""
    assert (seen == 0).all() and (data == 1).all()


@pytest.mark.parametrize(("pitch", "passes"), [(16, 4), (32, 8), (64, 16), (128, 32), (144, 4)])
def test_bank_conflicts_of_ldmatrix_are_counted(
    probe: Callable[..., str], library: ctypes.CDLL, pitch: int, passes: int
) -> None:
    assert probe("probe_banks", pitch) == ""
    assert library.emulator_counters(0).contents.ldmatrix_passes == passes


@pytest.mark.parametrize(("pitch", "passes"), [(4, 1), (8, 2), (64, 16), (128, 32), (132, 1)])
def test_bank_conflicts_of_stores_are_counted(
    probe: Callable[..., str], library: ctypes.CDLL, pitch: int, passes: int
) -> None:
    assert probe("probe_store_banks", pitch) == ""
    assert library.emulator_counters(0).contents.shared_store_passes == passes


def test_a_seed_changes_the_schedule(probe: Callable[..., str]) -> None:
    orders = set()
    for seed in range(5):
        order = np.full(8, -1, np.int32)
        assert probe("probe_schedule", order, seed=seed) == ""
        assert sorted(order) == list(range(8))
        orders.add(tuple(order))
    assert len(orders) == 5
