"""Planted bugs: each is a change of the kernels' source that the verification must notice.

Every barrier and every wait is deleted once, by search, so that a new one is covered without a word here; the others
are mistakes that such kernels are prone to.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from cases import Case
from emulated import KERNELS, Kernels
from verification import check_backward, check_forward

HEAD_DIM = 32
TIMEOUT_S = 300
CASES = (Case("bf16", HEAD_DIM, 150, causal=True, grouped=True), Case("bf16", HEAD_DIM, 100, packed=True))
SYNCHRONISATION = re.compile(r"ptx::(sync_block|sync_warp|cp_async_wait<[^>]*>)\(\);")


@dataclass(frozen=True)
class Mutant:
    """`original`, which occurs once after `after`, becomes `replacement`."""

    name: str
    file: str
    original: str
    replacement: str
    after: str = ""

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
    Mutant("running sum not rescaled", "forward.cuh", "sum[half] *= rescale;", ""),
    Mutant("output not rescaled", "forward.cuh", "output[n][2 * half] *= rescale;", ""),
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


def every_mutant() -> list[Mutant]:
    return [*_without_synchronisation(), *MISTAKES]


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
        library = Kernels(torch.bfloat16, HEAD_DIM, kernels=changed, options=("-O1", "-w"))
        sender.send(_first_complaint(library))


def _first_complaint(library: Kernels) -> str:
    try:
        for case in CASES:
            check_forward(case, library)
            check_backward(case, library)
            check_backward(case, library, deterministic=True)
    except AssertionError as complaint:
        lines = str(complaint).splitlines()
        # "case: n errors", then the emulator's first; or one line of what is wrong with the values.
        return "emulator: " + lines[1].partition(", thread ")[2].partition(": ")[2] if len(lines) > 1 else lines[0]
    return ""
