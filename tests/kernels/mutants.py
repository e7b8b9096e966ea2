"""Planted bugs: each is a change of the kernels' source that the verification must notice.

Every barrier and every wait is deleted once, by search, so that a new one is covered without a word here; the others
are mistakes that such kernels are prone to. The emulator judges them all but those in the instructions themselves
(ptx.cuh), which a host compiler never sees: these are for the interpreter of PTX.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import interpreted
import torch
from cases import DTYPES, Case
from emulated import KERNELS, Kernels, ShortKernels, WavefrontKernels
from verification import check_backward, check_forward

HEAD_DIM = 32
TIMEOUT_S = 300
CASES = (Case("bf16", HEAD_DIM, 150, causal=True, grouped=True), Case("bf16", HEAD_DIM, 100, packed=True))
HALF_CASE = Case("fp16", HEAD_DIM, 70)  # beside them for the instructions, some of which are of this type only
# The last has logits of ±500, without which any number will do for a maximum.
SHORT_CASES = (*CASES, Case("bf16", HEAD_DIM, 70, query_scale=25.0, scale=1.0))
WAVEFRONT_CASES = (
    Case("bf16", HEAD_DIM, 300, causal=True, grouped=True),
    Case("bf16", HEAD_DIM, 200, causal=True, packed=True),
)
SCHEDULES = ((0, 1), (1, 1), (2, 3), (3, 16))  # seeds, and blocks in flight
SYNCHRONISATION = re.compile(r"ptx::(sync_block|sync_warp|cp_async_wait<[^>]*>|fence)\(\);")


@dataclass(frozen=True)
class Mutant:
    """`original`, which occurs once after `after`, becomes `replacement`."""

    name: str
    file: str
    original: str
    replacement: str
    after: str = ""

    @property
    def by_interpreter(self) -> bool:
        return self.file == "ptx.cuh"

    @property
    def of_short(self) -> bool:
        return self.file.startswith("short")

    @property
    def of_wavefront(self) -> bool:
        return self.file.startswith("wavefront")

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        head, marker, tail = path.read_text().partition(self.after) if self.after else ("", "", path.read_text())
        assert self.original in tail, f"{self.name}: its line is gone"
        path.write_text(head + marker + tail.replace(self.original, self.replacement, 1))


MISTAKES = (
    Mutant("one copy too many may be pending (forward)", "forward.cuh", "cp_async_wait<0>", "cp_async_wait<1>"),
    Mutant("one copy too many may be pending (dK, dV)", "backward.cuh", "wait<STAGES - 1>", "wait<STAGES>"),
    Mutant("next tile copied over the one in use", "forward.cuh", "start_copies(parity ^ 1,", "start_copies(parity,"),
    Mutant("causal: one key too many", "problem.cuh", "query + 1", "query + 2"),
    Mutant("causal: one query too many", "problem.cuh", "problem.causal ? key :", "problem.causal ? key - 1 :"),
    Mutant(
        "documents see the row's start",
        "problem.cuh",
        "return {document.begin, problem.causal",
        "return {0, problem.causal",
    ),
    Mutant("a tile's last hidden key is not hidden", "forward.cuh", "* 8 <= keys.end", "* 8 <= keys.end + 1"),
    Mutant("block sees the keys of its first row only", "forward.cuh", "last_row).end", "first_row).end"),
    Mutant("rows past the end are read", "tile.cuh", "source, first + row < end", "source, true"),
    Mutant("rows past the end are written", "tile.cuh", "words, first + row < end", "words, true"),
    Mutant("wrong key head", "problem.cuh", "head / (heads / key_heads)", "head % (heads / key_heads)"),
    Mutant("right operands swapped", "tile.cuh", "left, a, b[0], b[1]", "left, a, b[0], b[2]"),
    Mutant(
        "left operand's rows and columns swapped",
        "tile.cuh",
        "pack(T{}, left[2], left[3])",
        "pack(T{}, right[0], right[1])",
    ),
    Mutant(
        "address of a chunk off by a swizzle",
        "tile.cuh",
        "address ^ (chunks % PERIOD * 16)",
        "address + (chunks % PERIOD * 16)",
    ),
    Mutant("no swizzle: bank conflicts", "tile.cuh", "chunk ^ (row / ROWS_IN_128_BYTES % PERIOD)", "chunk"),
    Mutant("running sum not rescaled", "forward.cuh", "sum[half] *= rescale[half];", ""),
    Mutant("output not rescaled", "forward.cuh", "scale_rows(output[t], rescale);", ""),
    Mutant("maximum of half a row", "tile.cuh", "return fmaxf(value, ptx::shuffle_xor(value, 2))", "return value"),
    Mutant("log-sum-exp to base 2", "forward.cuh", "const float lse = LN_2 *", "const float lse ="),
    Mutant("U instead of 2 U", "forward.cuh", "= -2.f * (ptx::low", "= -1.f * (ptx::low"),
    Mutant("one of two signs changed", "tile.cuh", "0x80008000u", "0x8000u"),
    Mutant(
        "delta with U for 2 U - O", "backward.cuh", "(2.f * ptx::low(T{}, uu) - ptx::low(T{}, o))", "ptx::low(T{}, uu)"
    ),
    Mutant("dK not scaled", "backward.cuh", "grad_key[n][i] *= problem.scale", "grad_key[n][i] *= 1.f"),
    Mutant(
        "U of the first head for all of a group",
        "backward.cuh",
        "p.u.rows(work.batch, head)",
        "p.u.rows(work.batch, 0)",
    ),
    Mutant("dQ stored, not added", "backward.cuh", "ptx::reduce_add_global(", "ptx::store_global("),
)

SHORT = (
    Mutant("one copy too many may be pending (short forward)", "short_forward.cuh", "wait<1>", "wait<2>"),
    Mutant("one copy too many may be pending (short backward)", "short_backward.cuh", "wait<1>", "wait<2>"),
    Mutant("a block seen in part is left out", "short.cuh", "first < span.end", "first + count < span.end"),
    Mutant("two warps with the same rows", "short.cuh", "warps + 3 - warp", "warps + 2 - warp"),
    Mutant("one warp too few", "short.cuh", "(p.problem.seq + WARP_ROWS - 1) /", "p.problem.seq /"),
    Mutant("maximum of another row", "short_forward.cuh", "fmaxf(maximum[i / 2],", "fmaxf(maximum[0],"),
    Mutant(
        "sum of another row",
        "short_forward.cuh",
        "output[t][n][i] * inverse_sum[t][i / 2]",
        "output[t][n][i] * inverse_sum[t][0]",
    ),
    Mutant("rows past the end divided by 0", "short_forward.cuh", "total > 0.f ?", "true ?"),
    Mutant("U for 2 U", "short_forward.cuh", "{-2.f, -2.f}", "{-1.f, -1.f}"),
    Mutant("log-sum-exp of the first queries for all", "short_backward.cuh", "lse + first_query * 4,", "lse,"),
    Mutant("delta of the neighbour", "short_backward.cuh", "- delta_of[0])", "- delta_of[1])"),
    Mutant("one of two signs changed (short)", "short.cuh", "0x80008000u", "0x8000u"),
    Mutant("dK not scaled (short)", "short_backward.cuh", "scale_sum();", "", "multiply(query_tile);"),
    Mutant("dS^T of the wrong stage", "short_backward.cuh", "grad_scores_tile(parity ^ 1)", "grad_scores_tile(parity)"),
    Mutant(
        "dS^T of the first warp's queries",
        "short_backward.cuh",
        "grad_scores_tile(parity ^ 1), warp_row",
        "grad_scores_tile(parity ^ 1), 0",
    ),
    Mutant("dK and dV of a group's last head only", "short_backward.cuh", "i > 0 && row < problem.seq", "false"),
    Mutant(
        "unseen weights are not 0",
        "short_backward.cuh",
        "weights[t][block][i] = 0;",
        "weights[t][block][i] = 0x3f803f80u;",
    ),
)

WAVEFRONT = (
    Mutant(
        "blocks by index, not by ticket (forward)",
        "wavefront_forward.cuh",
        "work_of(take_ticket(p.workspace, note)",
        "work_of(ptx::block_index()",
    ),
    Mutant(
        "blocks by index, not by ticket (backward)",
        "wavefront_backward.cuh",
        "work_of(take_ticket(p.workspace, note)",
        "work_of(ptx::block_index()",
    ),
    Mutant(
        "backward from the first block on",
        "wavefront_backward.cuh",
        "work.block = (problem.seq - 1) / OWN - work.block;",
        "",
    ),
    Mutant(
        "workspace not reset (forward)",
        "wavefront_forward.cuh",
        "ptx::fill_zero(p.workspace, wavefront_workspace_bytes(problem), stream)",
        "ptx::SUCCESS",
    ),
    Mutant(
        "flags not reset, but the ticket (backward)",
        "wavefront_backward.cuh",
        "wavefront_workspace_bytes(problem), stream",
        "sizeof(int), stream",
    ),
    Mutant(
        "flag by a plain store",
        "wavefront.cuh",
        "ptx::store_release(flag, 1)",
        "ptx::store_global(static_cast<void*>(flag), 1, true)",
    ),
    Mutant(
        "flag set before U is stored",
        "wavefront_forward.cuh",
        "if (tile == warp_own) {",
        "publish_tile(flag_of(tile));\n      if (tile == warp_own) {",
    ),
    Mutant(
        "flag set before dU is stored",
        "wavefront_backward.cuh",
        "if (tile_row >= 0 &&",
        "publish_tile(flag_of(tile, head));\n        if (tile_row >= 0 &&",
    ),
    Mutant(
        "flag set before delta is stored",
        "wavefront_backward.cuh",
        "ptx::sync_block();  // all parts of delta are there",
        "publish_tile(flag_of(tile, head));",
    ),
    Mutant(
        "a count instead of flags: U handed on says that the tile above was (lag 1)",
        "wavefront_forward.cuh",
        "publish_tile(flag_of(tile));",
        "publish_tile(flag_of(tile));\n      if (ptx::thread_index() == 0 && tile == own && own > begin) "
        "ptx::store_release(flag_of(own - 1), 1);",
    ),
    Mutant("one flag for all tiles", "wavefront_forward.cuh", "* tiles + tile;", "* tiles;"),
    Mutant(
        "one set of flags for all heads", "wavefront_forward.cuh", "+ ptx::recompute(work.head)) * tiles", ") * tiles"
    ),
    Mutant(
        "flags of backward in ascending order", "wavefront_backward.cuh", "tiles + tiles - 1 - tile", "tiles + tile"
    ),
    Mutant("no flag is awaited", "wavefront.cuh", "while (!(set & 1)) set =", "set ="),
    Mutant("the first warp alone waits", "wavefront.cuh", "broadcast(ptx::trailing_ones(set), note)", "1"),
    Mutant("flags that are set later count as set", "wavefront.cuh", "ptx::trailing_ones(set)", "32"),
    Mutant(
        "the tile before is awaited (forward)",
        "wavefront_forward.cuh",
        "await_tiles(flag_of(u_tile)",
        "await_tiles(flag_of(u_tile) - 1",
    ),
    Mutant(
        "the tile before is awaited (backward)",
        "wavefront_backward.cuh",
        "await_tiles(flag_of(tile, head)",
        "await_tiles(flag_of(tile, head) - 1",
    ),
    Mutant("lag 1: one place for two tiles of U", "wavefront_forward.cuh", "tile % Tiling::U_TILES", "0"),
    Mutant(
        "lag 1: weights of this tile for U of the one before",
        "wavefront_forward.cuh",
        "weights[LAG], u_tile_of",
        "weights[0], u_tile_of",
    ),
    Mutant(
        "lag 1: A U not rescaled",
        "wavefront_forward.cuh",
        "scale_rows(a_u[t], rescale[t]);",
        "",
        "if (LAG == 1 && sees)",
    ),
    Mutant("lag 1: the last tile of U left out", "wavefront_forward.cuh", "tile < end + LAG", "tile < end"),
    Mutant("lag 0: A U not rescaled", "wavefront_forward.cuh", "if (LAG == 0) scale_rows(a_u[t], rescale[t]);", ""),
    Mutant(
        "U past the end is not a number",
        "wavefront_forward.cuh",
        "exists ? ptx::reciprocal(total) : 0.f",
        "ptx::reciprocal(total)",
    ),
    Mutant("A U not divided by the sum", "wavefront_forward.cuh", "- sum[t][i / 2] * a_u", "- a_u"),
    Mutant("half of delta's parts", "wavefront_backward.cuh", "total += pair[0] + pair[1];", "total += pair[0];"),
    Mutant(
        "dU of a group's first head",
        "wavefront_backward.cuh",
        "p.grad_u.rows(work.batch, head)",
        "p.grad_u.rows(work.batch, work.head * (problem.heads / problem.key_heads))",
        "start_copy_of_grad_u = ",
    ),
)

BF16_MMA = "DEVICE void mma_m16n8k16(Bf16"
INSTRUCTIONS = (
    Mutant(
        "mma: rows of the left operand swapped", "ptx.cuh", '"r"(a[0]), "r"(a[1])', '"r"(a[1]), "r"(a[0])', BF16_MMA
    ),
    Mutant(
        "mma: halves of the left operand swapped", "ptx.cuh", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', BF16_MMA
    ),
    Mutant("mma: halves of the right operand swapped", "ptx.cuh", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', BF16_MMA),
    Mutant("mma: accumulators in another order", "ptx.cuh", "{%0,%1,%2,%3};", "{%0,%2,%1,%3};", BF16_MMA),
    Mutant("mma: accumulators only written", "ptx.cuh", '"+f"(d[1])', '"=f"(d[1])', BF16_MMA),
    Mutant("mma: elements taken for fp16", "ptx.cuh", "f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    Mutant("mma: elements taken for bf16", "ptx.cuh", "f32.f16.f16.f32", "f32.bf16.bf16.f32"),
    Mutant("ldmatrix: .trans dropped", "ptx.cuh", "x4.trans.shared", "x4.shared"),
    Mutant("ldmatrix: .trans where none belongs", "ptx.cuh", "x4.shared", "x4.trans.shared"),
    Mutant("ldmatrix: matrices swapped", "ptx.cuh", '"=r"(r[1]), "=r"(r[2])', '"=r"(r[2]), "=r"(r[1])', "ldmatrix_x4("),
    Mutant("cp.async: half of 16 bytes", "ptx.cuh", "valid ? 16 : 0", "valid ? 8 : 0"),
    Mutant("cp.async: 8 bytes past the L1 cache", "ptx.cuh", "[%1], 16, %2", "[%1], 8, %2"),
    Mutant("cp.async: rows past the end are read", "ptx.cuh", "[%1], 16, %2", "[%1], 16"),
    Mutant("cp.async: statistics past the end are read", "ptx.cuh", "[%1], 4, %2", "[%1], 4"),
    Mutant("cp.async: groups never committed", "ptx.cuh", "cp.async.commit_group;", ""),
    Mutant("cp.async: one group too many may be pending", "ptx.cuh", '"n"(PENDING)', '"n"(PENDING + 1)'),
    Mutant("a warp's barrier for the block's", "ptx.cuh", "__syncthreads()", "__syncwarp()"),
    Mutant("shuffle: mask of half a warp", "ptx.cuh", "0xffffffffu, value", "0x0000ffffu, value"),
    Mutant("shuffle: up for xor", "ptx.cuh", "__shfl_xor_sync", "__shfl_up_sync"),
    Mutant(
        "exponential to another base",
        "ptx.cuh",
        "ex2.approx.ftz.f32 %0, %1",
        "mul.f32 %0, %1, 0f3FB8AA3B; ex2.approx.f32 %0, %0",
    ),
    Mutant("square root for the reciprocal", "ptx.cuh", "rcp.approx", "sqrt.approx"),
    Mutant("bf16: halves of a packed word swapped", "ptx.cuh", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    Mutant(
        "fp16: halves of a packed word swapped", "ptx.cuh", '"f"(high), "f"(low)', '"f"(low), "f"(high)', "pack(Fp16"
    ),
    Mutant("fp16: packed as bf16", "ptx.cuh", "cvt.rn.f16x2", "cvt.rn.bf16x2"),
    Mutant("fp16: low half read for the high one", "ptx.cuh", "%0, hi;", "%0, lo;"),
    Mutant("ld.shared: a pair in reverse", "ptx.cuh", "ld.shared.v2.f32 {%0,%1}", "ld.shared.v2.f32 {%1,%0}"),
    Mutant("ld.shared: four words out of order", "ptx.cuh", "v4.b32 {%0,%1,%2,%3}", "v4.b32 {%0,%1,%3,%2}"),
    Mutant("st.global: four words out of order", "ptx.cuh", "v.word[2], v.word[3])", "v.word[3], v.word[2])"),
    Mutant("stores that do not ask whether", "ptx.cuh", "if (valid) *static_cast<uint4*>", "*static_cast<uint4*>"),
    Mutant("dQ: st for red", "ptx.cuh", "red.global.add.f32", "st.global.f32"),
)


def every_mutant() -> list[Mutant]:
    return [*_without_synchronisation(), *MISTAKES, *SHORT, *WAVEFRONT, *INSTRUCTIONS]


def _without_synchronisation() -> Iterator[Mutant]:
    for path in sorted(KERNELS.glob("*.cuh")):
        if path.name == "ptx.cuh":
            continue
        text = path.read_text()
        for found in SYNCHRONISATION.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Mutant(f"{path.name}:{line} without {found[1]}", path.name, found[0], "", after=text[: found.start()])


def verdict(mutant: Mutant | None) -> str:
    """Returns the first thing noticed about the kernels with this bug, or "" if nothing was (as for None)."""
    context = multiprocessing.get_context("fork")  # a bug may end the process, and torch is slow to import
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(mutant, sender))
    process.start()
    sender.close()
    try:
        return str(receiver.recv()) if receiver.poll(TIMEOUT_S) else "does not end"
    except EOFError:
        return "crashes"
    finally:
        process.kill()
        process.join()


def _judge(mutant: Mutant | None, sender: Connection) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(shutil.copytree(KERNELS, Path(folder) / "cuda"))
        if mutant is not None:
            mutant.apply(changed)
        if mutant is not None and mutant.of_short:
            sender.send(_first_complaint(lambda: _check_short(changed)))
        elif mutant is not None and mutant.of_wavefront:
            sender.send(_first_complaint(lambda: _check_wavefront(changed, mutant.file)))
        else:
            by_interpreter = mutant is not None and mutant.by_interpreter
            sender.send(_first_complaint(lambda: _check(changed, by_interpreter), by_interpreter))


def _check_short(changed: Path) -> None:
    library = ShortKernels(torch.bfloat16, HEAD_DIM, kernels=changed, options=("-O1", "-w"))
    for case in SHORT_CASES:
        check_forward(case, library)
        check_backward(case, library)


def _check_wavefront(changed: Path, file: str) -> None:
    for case, lag in product(WAVEFRONT_CASES, (0, 1)):
        library = WavefrontKernels(torch.bfloat16, HEAD_DIM, lag, kernels=changed, options=("-O1", "-w"))
        for seed, resident in SCHEDULES:
            if file != "wavefront_backward.cuh":
                check_forward(case, library, seed=seed, resident=resident)
            elif lag == 0:
                check_backward(case, library, deterministic=seed > 1, seed=seed, resident=resident)


def _check(changed: Path, by_interpreter: bool) -> None:
    def library(case: Case) -> Kernels:
        if by_interpreter:
            return interpreted.Kernels(DTYPES[case.dtype], HEAD_DIM, kernels=changed)
        return Kernels(DTYPES[case.dtype], HEAD_DIM, kernels=changed, options=("-O1", "-w"))

    # A seed: in PTX a missing barrier shows only where warps do not keep step.
    options = {"seed": 1} if by_interpreter else {}
    for case in (*CASES, HALF_CASE) if by_interpreter else CASES:
        compiled = library(case)
        check_forward(case, compiled, **options)
        for deterministic in (False, True):
            check_backward(case, compiled, deterministic=deterministic, **options)


def _first_complaint(check: Callable[[], None], by_interpreter: bool = False) -> str:
    try:
        check()
    except subprocess.CalledProcessError:
        return ""  # what does not compile proves nothing
    except AssertionError as complaint:
        lines = str(complaint).splitlines()
        if len(lines) == 1:  # of what is wrong with the values
            return lines[0]
        # "case: n errors", then the tool's first
        place = r"PTX line \d+: " if by_interpreter else r".*?, thread \d+: "
        return ("interpreter: " if by_interpreter else "emulator: ") + re.split(place, lines[1], maxsplit=1)[-1]
    return ""
