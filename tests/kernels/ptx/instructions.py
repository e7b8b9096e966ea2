"""From an instruction to a step that carries it out: the table of handlers, and how operands are read.

A handler takes an instruction apart once and returns the step for a group of threads. Numbers are numpy arrays of the
instruction's type, with an element a thread. An instruction, or a form of one, that no handler knows is an error that
names its line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .machine import SPECIAL, Machine, Step
from .memory import UNSIGNED, Array
from .parser import Instruction, Kernel

TYPES = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (32, 64)},
    "pred": np.dtype(bool),
}
Reader = Callable[[Machine], Array]
Handler = Callable[[Instruction, Kernel], Step]
HANDLERS: dict[str, Handler] = {}


@dataclass
class Compiled:
    """A kernel ready to run."""

    kernel: Kernel
    steps: list[Step]
    leaders: frozenset[int]


def compile_kernel(kernel: Kernel) -> Compiled:
    """Raises PtxError where an instruction is not known."""
    return Compiled(kernel, [_step(each, kernel) for each in kernel.code], frozenset(kernel.labels.values()))


def _step(instruction: Instruction, kernel: Kernel) -> Step:
    handler = HANDLERS.get(instruction.opcode[0])
    if handler is None:
        raise instruction.error("this instruction is not known to the interpreter")
    step = handler(instruction, kernel)
    if instruction.predicate is None or instruction.opcode[0] == "bra":
        return step
    if instruction.opcode[0] in ("mma", "ldmatrix", "shfl", "vote", "bar", "ret", "exit"):
        raise instruction.error("a predicate on this instruction is not known to the interpreter")
    taken = predicate(instruction)
    return lambda machine: machine.narrowed(taken(machine), step)


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def type_of(instruction: Instruction, position: int = -1) -> np.dtype:
    name = instruction.opcode[position]
    if name not in TYPES:
        raise instruction.error(f"type {name} is not known here")
    return TYPES[name]


def number(text: str, kind: np.dtype) -> Array:
    """A constant: ``-1``, ``0x10``, ``0f3F800000`` (the bits of a float)."""
    bits = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text, 0)
    bits &= (1 << 8 * kind.itemsize) - 1
    return np.array(bits, UNSIGNED[kind.itemsize]).view(kind)


def reader(operand: object, kind: np.dtype, instruction: Instruction, kernel: Kernel) -> Reader:
    """How to read a register, a special register, a constant, or the address of a symbol."""
    assert isinstance(operand, str)
    if operand in kernel.registers:
        return lambda machine: machine.read(operand, kind)
    if operand in kernel.symbols:
        address = np.array(kernel.symbols[operand], kind)
        return lambda machine: address
    if operand[0].isdigit() or operand[0] == "-":
        constant = number(operand, kind)
        return lambda machine: constant
    if operand in SPECIAL:
        return lambda machine: machine.special[operand][machine.group].astype(kind)
    raise instruction.error(f"operand {operand} is not known here")


def predicate(instruction: Instruction) -> Reader:
    name, negated = instruction.predicate, instruction.negated
    assert name is not None
    return lambda machine: machine.read(name, TYPES["pred"]) != negated


def elementwise(
    instruction: Instruction, kernel: Kernel, function: Callable[..., Array], kinds: list[np.dtype], result: np.dtype
) -> Step:
    """destination = function(sources), each source read as its type."""
    destination, *sources = instruction.operands
    if len(sources) != len(kinds) or not isinstance(destination, str):
        raise instruction.error("these operands are not known to the interpreter")
    readers = [reader(source, kind, instruction, kernel) for source, kind in zip(sources, kinds, strict=True)]

    def step(machine: Machine) -> None:
        machine.write(destination, np.asarray(function(*(read(machine) for read in readers)), result))

    return step
