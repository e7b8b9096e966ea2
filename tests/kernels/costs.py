"""What a step of each kernel's main loop costs by arithmetic: its tiling, and what an SM does in a cycle.

A step is one tile of keys (or of queries) that a block works through. Counts are of one warp unless said otherwise; they
follow from the tilings of the kernels, and the compiled code must agree with them (compiled.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MMA_FLOPS = 2 * 16 * 8 * 16
OWN = 64  # rows of a backward kernel's block


@dataclass(frozen=True)
class Product:
    """Of tiles. Where not all of head_dim is unrolled, the code is run `trips` times."""

    mma: int
    ldmatrix: int
    trips: int = 1


@dataclass(frozen=True)
class Step:
    """One turn of the main loop."""

    products: tuple[Product, ...]
    exponentials: int  # a thread
    copied_bytes: int  # of the block, from global to shared memory
    copy_trips: int  # of the loop that copies one tile
    barriers: int = 1
    threads: int = 128  # of the block
    first_ldmatrix: int = 0  # in the first step only

    def total(self, count: str) -> int:
        return sum(getattr(product, count) for product in self.products)

    def trips(self) -> dict[str, int]:
        """How often the loops inside are run that have such an instruction."""
        return {"HMMA": max(product.trips for product in self.products), "LDGSTS": self.copy_trips}

    def in_code(self, count: str) -> int:
        """How often the instruction stands in the loop's code."""
        first = self.first_ldmatrix if count == "ldmatrix" else 0
        return first + sum(getattr(product, count) // product.trips for product in self.products)


def forward(head_dim: int, rescales: bool) -> Step:
    tiles, keys = (2 if head_dim <= 128 else 1), (64 if head_dim <= 64 else 32)
    in_registers = head_dim <= 64
    products = (
        _scores(keys, head_dim, tiles, loads_left=not in_registers, unrolled=in_registers),
        _from_registers(keys, head_dim, tiles),
    )
    return Step(
        products,
        exponentials=tiles * (keys // 8 * 4 + 2 * rescales),
        copied_bytes=2 * keys * head_dim * 2,
        copy_trips=_copy_trips(keys, head_dim),
        first_ldmatrix=tiles * head_dim // 16 if in_registers else 0,  # the queries
    )


def backward(head_dim: int, scores: int, from_registers: int, copied: int, barriers: int, adds_query: bool) -> Step:
    other = 64 if head_dim == 16 else 32
    products = [_scores(other, head_dim)] * scores + [_from_registers(other, head_dim)] * from_registers
    if adds_query:
        columns = head_dim * (other // 16) // 4
        products.append(_from_tiles(OWN, columns))
    copied_bytes = copied * other * head_dim * 2
    return Step(tuple(products), other // 8 * 4, copied_bytes, _copy_trips(other, head_dim), barriers)


def wavefront_forward(head_dim: int, lag: int) -> Step:
    tiles = 2 if lag == 0 and head_dim <= 64 else 1
    threads = (128 if lag == 0 else 64) // (16 * tiles) * 32
    keys = 64 if head_dim * tiles <= 64 else 32
    by_u = by_v = _from_registers(keys, head_dim, tiles)
    return Step(
        (_scores(keys, head_dim, tiles), by_v, by_u),
        exponentials=tiles * (keys // 8 * 4 + 2),
        copied_bytes=3 * keys * head_dim * 2,
        copy_trips=_copy_trips(keys, head_dim, threads),
        barriers=4,  # in the code; two of them in each step
        threads=threads,
    )


def wavefront_backward(head_dim: int, adds_query: bool) -> Step:
    other, column_groups = (64 if head_dim == 16 else 32), (1 if head_dim <= 64 else 2)
    queries, threads = other // column_groups, 128 * column_groups
    from_tiles = _from_tiles(other, head_dim // column_groups)
    products = [_scores(queries, head_dim)] * 3 + [from_tiles] * 3
    if adds_query:
        groups = threads // 32 // (other // 16)
        products.append(_from_tiles(OWN, -(-head_dim // 16 // groups) * 16))
    copied_bytes = 3 * other * head_dim * 2
    copy_trips = _copy_trips(other, head_dim, threads)
    return Step(tuple(products), queries // 8 * 4, copied_bytes, copy_trips, barriers=7, threads=threads)


def short_backward(head_dim: int, rows: int) -> Step:
    """A whole head: of 32 keys and all queries, and for dQ of 32 queries with 32 keys at a time."""
    scores = _scores(rows, head_dim, tiles=2, loads_left=False)
    by_query = Product(rows // 32 * head_dim // 2, rows // 32 * (4 + head_dim // 8), trips=rows // 32)
    return Step(
        (*[scores] * 3, *[_from_registers(rows, head_dim, tiles=2)] * 3, by_query),
        exponentials=rows,
        copied_bytes=3 * rows * head_dim * 2,
        copy_trips=_copy_trips(rows, head_dim, rows),
        barriers=6,
        threads=rows,
    )


def _copy_trips(rows: int, head_dim: int, threads: int = 128) -> int:
    return max(1, rows * head_dim // 8 // threads)


def _scores(columns: int, head_dim: int, tiles: int = 1, loads_left: bool = True, unrolled: bool = False) -> Product:
    """A B^T over head_dim: four steps of 16 at a time are unrolled above 96."""
    trips = 1 if unrolled or head_dim <= 96 else head_dim // 64
    depth = head_dim // 16
    return Product(tiles * columns // 8 * depth, (columns // 16 + tiles * loads_left) * depth, trips)


def _from_registers(rows: int, head_dim: int, tiles: int = 1) -> Product:
    return Product(tiles * rows // 16 * head_dim // 8, rows // 16 * head_dim // 16)


def _from_tiles(rows: int, columns: int) -> Product:
    return Product(rows // 16 * columns // 8, rows // 16 * (1 + columns // 16))


# By name and template arguments after the head dimension.
STEPS: dict[str, Callable[[int], Step]] = {
    "forward_kernel<0>": lambda d: forward(d, rescales=True),
    "forward_kernel<1>": lambda d: forward(d, rescales=False),
    "backward_u": lambda d: backward(d, 1, 1, copied=2, barriers=1, adds_query=False),
    "backward_keys<0>": lambda d: backward(d, 3, 2, copied=3, barriers=2, adds_query=False),
    "backward_keys<1>": lambda d: backward(d, 3, 2, copied=3, barriers=3, adds_query=True),
    "backward_query": lambda d: backward(d, 3, 1, copied=3, barriers=1, adds_query=False),
    "short_backward<128>": lambda d: short_backward(d, rows=128),
    "short_backward<256>": lambda d: short_backward(d, rows=256),
    "wavefront_forward<0>": lambda d: wavefront_forward(d, lag=0),
    "wavefront_forward<1>": lambda d: wavefront_forward(d, lag=1),
    "wavefront_backward<0>": lambda d: wavefront_backward(d, adds_query=False),
    "wavefront_backward<1>": lambda d: wavefront_backward(d, adds_query=True),
}


@dataclass(frozen=True)
class Multiprocessor:
    """An SM: what it holds (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    warps: int
    blocks: int
    shared_bytes: int
    # FLOPs a cycle of mma.sync with 16-bit elements and float32 sums, from the data sheets' dense rates, clocks and
    # SMs; None where none is published.
    tensor_flops: int | None


# sm_90: 4096 with wgmma, of which mma.sync reaches about 62 %. sm_86, 89, 120: GeForce; twice that on professional
# cards. sm_100: 8192 with tcgen05; nothing is published of mma.sync.
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024, 2048),
    86: Multiprocessor(48, 16, 100 * 1024, 512),
    89: Multiprocessor(48, 24, 100 * 1024, 512),
    90: Multiprocessor(64, 32, 228 * 1024, 2540),
    100: Multiprocessor(64, 32, 228 * 1024, None),
    120: Multiprocessor(48, 24, 100 * 1024, 512),
}
PEAKS = {80: ("A100", 312), 90: ("H100 SXM", 613)}  # TFLOP/s of mma.sync, dense: the latter 62 % of 989
REGISTERS_OF_QUARTER, SCHEDULERS = 16384, 4
RESERVED_BYTES = 1024  # of shared memory, a block
SHARED_BYTES_A_CYCLE, EXPONENTIALS_A_CYCLE = 128, 16


def blocks_in_flight(architecture: int, threads: int, registers: int, shared_bytes: int) -> int:
    """How many of a kernel's blocks an SM holds at once."""
    sm, warps = MULTIPROCESSORS[architecture], threads // 32
    registers_of_warp = -(-registers // 8) * 8 * 32  # given out by 256
    by_registers = REGISTERS_OF_QUARTER // registers_of_warp * SCHEDULERS // warps
    by_shared_bytes = sm.shared_bytes // (shared_bytes + RESERVED_BYTES)
    return min(sm.blocks, sm.warps // warps, by_registers, by_shared_bytes)


def cycles(step: Step, architecture: int, instructions: int) -> dict[str, float]:
    """How long each pipe of an SM is busy with one block's step, if nothing stands in its way. Not a prediction: pipes
    overlap only as well as there are warps ready to run.

    Args:
        instructions: that a warp issues in the step.
    """
    warps, flops = step.threads // 32, MULTIPROCESSORS[architecture].tensor_flops
    shared_bytes = warps * step.total("ldmatrix") * 512 + step.copied_bytes
    return {
        "tensor": warps * step.total("mma") * MMA_FLOPS / flops if flops else float("nan"),
        "shared": shared_bytes / SHARED_BYTES_A_CYCLE,
        "exponentials": warps * step.exponentials * 32 / EXPONENTIALS_A_CYCLE,
        "issue": warps * instructions / SCHEDULERS,
    }
