"""The emulator itself: each instruction against the PTX ISA's tables, and each mistake it must notice."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import emulated
import numpy as np
import pytest
import torch

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
        name: str, *arguments: object, seed: int = 0, buffers: dict[str, tuple[np.ndarray, bool]] | None = None
    ) -> str:
        library.emulator_reset(ctypes.c_uint32(seed), ctypes.c_bool(False))
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


def bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mma_takes_the_fragments_of_the_isa(probe: Callable[..., str], dtype: torch.dtype) -> None:
    """Matrix fragments for mma.m16n8k16 with .f16/.bf16 elements: a0..a7, b0..b3 and c0..c3 of each lane."""
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))

    a_lane, b_lane, c_lane = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16), np.zeros((32, 4), np.float32)
    for i in range(8):
        row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
        column = MEMBER * 2 + (i & 1) + (0 if i < 4 else 8)
        a_lane[:, i] = bits(a[row, column], dtype)
    for i in range(4):
        b_lane[:, i] = bits(b[MEMBER * 2 + (i & 1) + (0 if i < 2 else 8), GROUP], dtype)
    positions = [(GROUP if i < 2 else GROUP + 8, MEMBER * 2 + (i & 1)) for i in range(4)]
    for i, position in enumerate(positions):
        c_lane[:, i] = c[position]

    assert probe("probe_mma", dtype == torch.bfloat16, a_lane, b_lane, c_lane) == ""
    expected = c + a @ b
    for i, position in enumerate(positions):
        np.testing.assert_array_equal(c_lane[:, i], expected[position])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "trans"])
def test_ldmatrix_deals_out_rows_as_the_isa_says(probe: Callable[..., str], transposed: bool) -> None:
    """Lane 8m + i addresses row i of matrix m; lane l gets elements 2(l % 4), +1 of row l / 4, or column."""
    tile = np.arange(32 * 8, dtype=np.uint16)
    order = np.random.default_rng(1).permutation(32)
    result = np.zeros((32, 4, 2), np.uint16)
    assert probe("probe_ldmatrix", tile, tile.size // 2, transposed, (order * 16).astype(np.uint32), result) == ""

    matrices = tile.reshape(32, 8)[order].reshape(4, 8, 8)
    for matrix in range(4):
        source = matrices[matrix].T if transposed else matrices[matrix]
        np.testing.assert_array_equal(result[:, matrix, 0], source[GROUP, MEMBER * 2])
        np.testing.assert_array_equal(result[:, matrix, 1], source[GROUP, MEMBER * 2 + 1])


@pytest.mark.parametrize("mask", [1, 2, 16])
def test_shuffle(probe: Callable[..., str], mask: int) -> None:
    values = LANE.astype(np.float32)
    assert probe("probe_shuffle", values, mask) == ""
    np.testing.assert_array_equal(values, LANE ^ mask)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cp_async_brings_bytes_or_zeros(probe: Callable[..., str], seed: int) -> None:
    source, result = np.arange(1, 129, dtype=np.uint32), np.zeros((32, 4), np.uint32)
    assert probe("probe_cp_async", source, result, seed=seed, buffers={"source": (source, False)}) == ""
    np.testing.assert_array_equal(result, np.where(LANE[:, None] % 2 == 0, source.reshape(32, 4), 0))


@pytest.mark.parametrize(("pending", "group", "complaint"), [(0, 1, False), (1, 0, False), (1, 1, True)])
def test_cp_async_may_be_read_only_after_its_wait(
    probe: Callable[..., str], pending: int, group: int, complaint: bool
) -> None:
    source = np.zeros(32, np.uint32)
    log = probe("probe_cp_async_groups", source, pending, group, buffers={"source": (source, False)})
    assert ("copy in flight" in log) == complaint
    # The neighbouring lane's half of the pair: this lane's wait says nothing of it.
    assert complaint or "read after write" in log


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("value", [1.0, -3.1415927, 1.00390625, 1e-7, 7e4, -1e39, 0.0])
def test_pack_rounds_to_nearest_even(probe: Callable[..., str], dtype: torch.dtype, value: float) -> None:
    word, unpacked = np.zeros(1, np.uint32), np.zeros(2, np.float32)
    probe("probe_pack", dtype == torch.bfloat16, value, 1.0, word, unpacked)
    rounded = torch.tensor([value], dtype=torch.float32).to(dtype)
    assert word[0] & 0xFFFF == rounded.view(torch.int16).item() & 0xFFFF
    assert unpacked.tolist() == [rounded.float().item(), 1.0]


@pytest.mark.parametrize("value", [0.0, -math.inf, 1.0, -3.5, 0.75])
def test_math(probe: Callable[..., str], value: float) -> None:
    """Of the special values, those that kernels rely on: 2^-inf = 0."""
    results = np.zeros(3, np.float32)
    probe("probe_math", value, results)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.float32(value)
        np.testing.assert_allclose(results, [np.exp2(x), np.log2(x), 1 / x], rtol=1e-6)


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
