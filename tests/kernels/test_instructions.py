"""Each function of ptx.cuh against the PTX ISA's tables: in the emulator, and as nvcc compiles it, in the interpreter."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import emulated
import interpreted
import numpy as np
import ptx
import pytest
import torch

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # "groupID" and "threadID_in_group" in the PTX ISA
PROBES = Path(ptx.__file__).parent / "probes.cu"

Probe = Callable[..., None]


@cache
def emulator() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated.build("probes.cpp")))
    library.emulator_log.restype = ctypes.c_char_p
    return library


@cache
def kernels() -> dict[str, ptx.Kernel]:
    return ptx.parse(interpreted.compile_to_ptx(PROBES).read_text())


def emulate(name: str, *arguments: np.ndarray | int | float) -> None:
    library = emulator()
    library.emulator_reset(ctypes.c_uint32(0), ctypes.c_bool(False), 1)
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            address, size = ctypes.c_void_p(argument.ctypes.data), ctypes.c_size_t(argument.nbytes)
            library.emulator_buffer(name.encode(), address, size, ctypes.c_bool(True), ctypes.c_bool(True))
    getattr(library, name)(*(as_c(argument) for argument in arguments))
    assert library.emulator_log().decode() == ""


def as_c(argument: np.ndarray | int | float) -> object:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


@pytest.fixture(params=["emulator", "interpreter"])
def probe(request: pytest.FixtureRequest) -> Probe:
    """Calls a probe with arrays and numbers."""
    if request.param == "emulator":
        return emulate
    if interpreted.nvcc() is None:
        pytest.skip("no nvcc")
    compiled = kernels()
    return lambda name, *arguments: interpreted.run_on_arrays(compiled[name], *arguments, shared_bytes=512)


def bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mma_takes_the_fragments_of_the_isa(probe: Probe, dtype: torch.dtype) -> None:
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

    probe("probe_mma", dtype == torch.bfloat16, a_lane, b_lane, c_lane)
    expected = c + a @ b
    for i, position in enumerate(positions):
        np.testing.assert_array_equal(c_lane[:, i], expected[position])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "trans"])
def test_ldmatrix_deals_out_rows_as_the_isa_says(probe: Probe, transposed: bool) -> None:
    """Lane 8m + i addresses row i of matrix m; lane l gets elements 2(l % 4), +1 of row l / 4, or column."""
    tile = np.arange(32 * 8, dtype=np.uint16)
    order = np.random.default_rng(1).permutation(32)
    result = np.zeros((32, 4, 2), np.uint16)
    probe("probe_ldmatrix", tile, tile.size // 2, transposed, (order * 16).astype(np.uint32), result)

    matrices = tile.reshape(32, 8)[order].reshape(4, 8, 8)
    for matrix in range(4):
        source = matrices[matrix].T if transposed else matrices[matrix]
        np.testing.assert_array_equal(result[:, matrix, 0], source[GROUP, MEMBER * 2])
        np.testing.assert_array_equal(result[:, matrix, 1], source[GROUP, MEMBER * 2 + 1])


@pytest.mark.parametrize("mask", [1, 2, 16])
def test_shuffle(probe: Probe, mask: int) -> None:
    values = LANE.astype(np.float32)
    probe("probe_shuffle", values, mask)
    np.testing.assert_array_equal(values, LANE ^ mask)


def test_cp_async_brings_bytes_or_zeros(probe: Probe) -> None:
    source, result = np.arange(1, 129, dtype=np.uint32), np.zeros((32, 4), np.uint32)
    probe("probe_cp_async", source, result)
    np.testing.assert_array_equal(result, np.where(LANE[:, None] % 2 == 0, source.reshape(32, 4), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("value", [1.0, -3.1415927, 1.00390625, 1e-7, 7e4, -1e39, 0.0])
def test_pack_rounds_to_nearest_even(probe: Probe, dtype: torch.dtype, value: float) -> None:
    word, unpacked = np.zeros(1, np.uint32), np.zeros(2, np.float32)
    probe("probe_pack", dtype == torch.bfloat16, value, 1.0, word, unpacked)
    rounded = torch.tensor([value], dtype=torch.float32).to(dtype)
    assert word[0] & 0xFFFF == rounded.view(torch.int16).item() & 0xFFFF
    assert unpacked.tolist() == [rounded.float().item(), 1.0]


@pytest.mark.parametrize("value", [0.0, -math.inf, 1.0, -3.5, 0.75])
def test_math(probe: Probe, value: float) -> None:
    """Of the special values, those that kernels rely on: 2^-inf = 0."""
    results = np.zeros(3, np.float32)
    probe("probe_math", value, results)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.float32(value)
        np.testing.assert_allclose(results, [np.exp2(x), np.log2(x), 1 / x], rtol=1e-6)


def test_memory(probe: Probe) -> None:
    """Words in pairs and fours, loads and stores that happen in some lanes only, and a sum."""
    words = np.random.default_rng(3).integers(0, 2**31, 128).astype(np.uint32)
    pairs, fours, total = np.zeros(64, np.uint32), np.zeros(128, np.uint32), np.array([1, 100], np.float32)
    float_pairs, copied = np.zeros(64, np.float32), np.ones(128, np.uint32)
    probe("probe_memory", words, pairs, float_pairs, fours, copied, total)
    even = np.repeat(LANE % 2 == 0, 2)
    np.testing.assert_array_equal(pairs, np.where(even, words[:64], 0))
    np.testing.assert_array_equal(float_pairs.view(np.uint32), np.where(even, words[:64], 0))
    np.testing.assert_array_equal(fours, np.where(np.repeat(LANE % 2 == 1, 4), words, 0))
    np.testing.assert_array_equal(copied, np.where(np.repeat(LANE % 2 == 0, 4), words, 0))
    assert total.tolist() == [1 + sum(lane + 100 * (lane % 2 == 0) for lane in range(0, 32, 3)), 100]


def test_ballot_and_trailing_ones(probe: Probe) -> None:
    words = np.random.default_rng(2).integers(0, 2**32, 32).astype(np.uint32)
    words[:3] = 2**32 - 1, 0, 0b10111
    sets, ones = np.zeros(32, np.uint32), np.zeros(32, np.int32)
    probe("probe_ballot", words, sets, ones)
    assert (sets == sum(1 << lane for lane in range(32) if words[lane] % 2)).all()
    assert ones.tolist() == [len(f"{word:032b}") - len(f"{word:032b}".rstrip("1")) for word in words]


def test_flags(probe: Probe) -> None:
    flags, read = np.array([3, 0], np.int32), np.zeros(2, np.int32)
    probe("probe_flags", flags, read)
    assert flags.tolist() == [8, 7] and read.tolist() == [3, 8]
