"""Runs a kernel: all threads of all blocks in flight at once, as long as they are at the same instruction.

Every thread has its own place in the code. The group that runs next is all threads at the lowest place that any thread
can go on from, so that those that took different branches meet again as soon as the code lets them, and blocks of equal
length run as one. Registers are arrays with an element a thread; an instruction reads and writes those of its group.

A thread waits at an instruction of its warp for the other 31, at `bar.sync` for the other threads of its block. One
that reads a flag (`ld.acquire`, `ld.relaxed`, `ld.volatile`) then lets all others run as far as they can before it goes
on, so that blocks may wait for each other.

With a seed, warps of a block take turns instead: the one whose turn it is, of every block, runs on until it must wait.
So a barrier that is missing shows as a read of what is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .memory import UNSIGNED, Array, Fault, Global, Memory, Shared
from .parser import Kernel, PtxError

READY, YIELDED, AT_WARP, AT_BARRIER, DONE = range(5)
WAITS_FOR = {AT_WARP: "its warp", AT_BARRIER: "its block"}
SPINS = 1000  # turns in which nothing happens but flags being read: then nothing ever will
SPECIAL = ("%tid.x", "%laneid", "%ctaid.x", "%ntid.x", "%nctaid.x")  # registers
BITS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}

Step = Callable[["Machine"], "bool | None"]  # True: the group's threads have been sent somewhere else


class Program(Protocol):
    """A kernel ready to run; see `instructions.compile_kernel`."""

    kernel: Kernel
    steps: list[Step]
    leaders: frozenset[int]  # where threads may come from elsewhere


@dataclass
class Copies:
    """What one cp.async of a group of threads is to bring."""

    threads: Array
    offsets: Array  # in shared memory
    values: Array  # (threads, words)
    group: Array  # how many the thread had committed before


@dataclass
class Launch:
    """A grid of one dimension; `parameters` is the bytes of all."""

    blocks: int
    threads: int
    shared_bytes: int
    parameters: bytes
    resident: int = 32  # blocks in flight at once; the others start when all of those have ended
    seed: int = 0  # of the order of warps; 0: all together


@dataclass
class Counts:
    """Instructions of whole warps."""

    mma: int = 0
    ldmatrix: int = 0


def run(program: Program, memory: Global, launch: Launch) -> Counts:
    """Runs all blocks.

    Raises:
        PtxError: the kernel makes a mistake, or never ends; names line, block and thread.
    """
    counts = Counts()
    for first in range(0, launch.blocks, launch.resident):
        blocks = np.arange(first, min(first + launch.resident, launch.blocks))
        with np.errstate(all="ignore"):
            Machine(program, memory, launch, blocks, counts).run()
    return counts


class Machine:
    """The blocks in flight."""

    def __init__(self, program: Program, memory: Global, launch: Launch, blocks: Array, counts: Counts) -> None:
        self.program, self.memory, self.launch, self.counts = program, memory, launch, counts
        self.threads = len(blocks) * launch.threads
        kernel = program.kernel
        self.shared = Shared(len(blocks), kernel.static_shared_bytes + launch.shared_bytes)
        self.parameters = Memory(len(launch.parameters))
        self.parameters.store(np.arange(len(launch.parameters)), np.frombuffer(launch.parameters, np.uint8))
        thread = np.tile(np.arange(launch.threads, dtype=np.uint32), len(blocks))
        self.block = np.repeat(np.arange(len(blocks)), launch.threads)  # of those in flight
        numbers = (
            thread,
            thread % 32,
            np.repeat(blocks.astype(np.uint32), launch.threads),
            np.full(self.threads, launch.threads, np.uint32),
            np.full(self.threads, launch.blocks, np.uint32),
        )
        self.special = dict(zip(SPECIAL, numbers, strict=True))
        self.registers: dict[str, Array] = {}
        self.place = np.zeros(self.threads, np.int64)
        self.state = np.full(self.threads, READY, np.uint8)
        self.copies: list[Copies] = []
        self.committed = np.zeros(self.threads, np.int64)  # groups of copies
        self.spins = 0  # turns since anything but flags being read
        self._warp = thread // 32
        self._random = np.random.default_rng(launch.seed)
        self._turn = 0
        # The group that runs.
        self.index = 0
        self.group: slice | Array = slice(0, self.threads)
        self.whole_warps = True

    def run(self) -> None:
        steps, leaders = self.program.steps, self.program.leaders
        try:
            while self._choose():
                while not steps[self.index](self):
                    self.index += 1
                    if self.index in leaders:
                        self.place[self.group] = self.index
                        break
        except Fault as fault:
            thread = np.arange(self.threads)[self.group][fault.index]
            raise self._error(str(fault), thread) from None
        if self.copies:
            raise self._error("ends with copies in flight", self.copies[0].threads[0])

    def _error(self, message: str, thread: int) -> PtxError:
        instruction = self.program.kernel.code[self.index]
        who = f"block {self.special['%ctaid.x'][thread]}, thread {self.special['%tid.x'][thread]}"
        return instruction.error(f"{who}: {message}")

    def _choose(self) -> bool:
        """Chooses the group to run next; False when all threads have ended."""
        ready = self.state == READY
        if not ready.any():
            yielded = self.state == YIELDED
            if yielded.any():
                self.spins += 1
                if self.spins > SPINS:
                    raise self._error("waits for a flag for ever", int(np.flatnonzero(yielded)[0]))
                self.state[yielded] = READY
                return self._choose()
            waiting = np.flatnonzero(self.state != DONE)
            if len(waiting):
                self.index = int(self.place[waiting[0]])
                raise self._error(f"deadlock: waits for {WAITS_FOR[int(self.state[waiting[0]])]}", int(waiting[0]))
            return False
        if self.launch.seed:
            if not (ready & (self._warp == self._turn)).any():
                self._turn = self._random.choice(np.unique(self._warp[ready]))
            ready &= self._warp == self._turn
        self.index = int(self.place[ready].min())
        self._set_group(np.flatnonzero(ready & (self.place == self.index)))
        return True

    def _set_group(self, threads: Array) -> None:
        first, last = int(threads[0]), int(threads[-1])
        contiguous = last - first + 1 == len(threads)
        self.group = slice(first, last + 1) if contiguous else threads
        warps = threads.reshape(-1, 32) if len(threads) % 32 == 0 else None
        self.whole_warps = warps is not None and bool(
            (warps[:, 0] % 32 == 0).all() and (warps[:, 31] == warps[:, 0] + 31).all()
        )

    # ---- what instructions do ----

    def read(self, name: str, kind: np.dtype) -> Array:
        """A register of the group's threads, as numbers of a type; of a wider register the lower bits."""
        values = self._register(name)[self.group]
        if values.dtype.itemsize > kind.itemsize:
            values = values.astype(UNSIGNED[kind.itemsize])
        return values.view(kind)

    def write(self, name: str, values: Array) -> None:
        """Sets a register of the group's threads; a wider register gets the number, of either sign."""
        register = self._register(name)
        if values.dtype.itemsize < register.dtype.itemsize:
            values = values.astype(np.dtype(f"{values.dtype.kind}{register.dtype.itemsize}"))
        register[self.group] = values.view(register.dtype)

    def _register(self, name: str) -> Array:
        register = self.registers.get(name)
        if register is None:
            bits = BITS[self.program.kernel.registers[name]]
            kind = np.dtype(bool) if bits == 1 else UNSIGNED[bits // 8]
            register = self.registers[name] = np.full(self.threads, np.iinfo(kind).max if bits > 1 else False, kind)
        return register

    def size(self) -> int:
        """Threads in the group."""
        return len(self.block[self.group])

    def narrowed(self, chosen: Array, step: Step) -> bool | None:
        """Lets a step be done by some of the group."""
        group, whole = self.group, self.whole_warps
        if chosen.any():
            self._set_group(np.arange(self.threads)[group][chosen])
            step(self)
        self.group, self.whole_warps = group, whole
        return None

    def go(self, target: int) -> bool:
        self.place[self.group] = target
        return True

    def branch(self, taken: Array, target: int) -> bool:
        self.place[self.group] = np.where(taken, target, self.index + 1)
        return True

    def end(self) -> bool:
        self.state[self.group] = DONE
        return True

    def let_others_run(self) -> bool:
        self.place[self.group] = self.index + 1
        self.state[self.group] = YIELDED
        return True

    def wait_for_warp(self) -> bool:
        """Where not all lanes have come: those who have wait for the others, and then go on together."""
        self.place[self.group] = self.index
        self.state[self.group] = AT_WARP
        here = (self.state == AT_WARP) & (self.place == self.index)
        self.state[np.repeat(here.reshape(-1, 32).all(axis=1), 32)] = READY
        return True

    def wait_for_block(self) -> bool:
        self.place[self.group] = self.index
        self.state[self.group] = AT_BARRIER
        here = (self.state == AT_BARRIER) & (self.place == self.index)
        complete = np.repeat(here.reshape(-1, self.launch.threads).all(axis=1), self.launch.threads)
        self.state[complete] = READY
        self.place[complete] = self.index + 1
        return True

    def start_copies(self, offsets: Array, values: Array) -> None:
        """The values arrive when their threads wait for them; until then nobody may read what is there."""
        for word in range(values.shape[1]):
            self.shared.forget(offsets + word * 4, 4)
        threads = np.arange(self.threads)[self.group]
        self.copies.append(Copies(threads, offsets, values, self.committed[self.group].copy()))

    def wait_for_copies(self, pending: int) -> None:
        """All but the last `pending` groups of copies of the group's threads arrive."""
        waits = np.zeros(self.threads, bool)
        waits[self.group] = True
        left = []
        for copies in self.copies:
            arrives = waits[copies.threads] & (copies.group < self.committed[copies.threads] - pending)
            if arrives.any():
                offsets = copies.offsets[arrives, None] + 4 * np.arange(copies.values.shape[1])
                self.shared.store(offsets, copies.values[arrives])
            if not arrives.all():
                stays = ~arrives
                parts = (copies.threads, copies.offsets, copies.values, copies.group)
                left.append(Copies(*(part[stays] for part in parts)))
        self.copies = left
