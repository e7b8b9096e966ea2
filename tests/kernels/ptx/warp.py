"""Instructions that the lanes of a warp execute together, barriers and branches, after the PTX ISA."""

from __future__ import annotations

import numpy as np

from .arithmetic import from_half
from .instructions import TYPES, handles, predicate, reader
from .machine import Machine, Step
from .memory import Array, check
from .parser import Address, Instruction, Kernel


def collective(step: Step) -> Step:
    """A step that whole warps take: lanes that come first wait for the others."""
    return lambda machine: step(machine) if machine.whole_warps else machine.wait_for_warp()


def stacked(machine: Machine, names: tuple[str, ...], kind: str) -> Array:
    """Registers of whole warps: (warps, 8, 4, len(names)), with lane 4g + t at [g, t]."""
    return np.stack([machine.read(name, TYPES[kind]) for name in names], axis=-1).reshape(-1, 8, 4, len(names))


def deal_out(machine: Machine, names: tuple[str, ...], values: Array) -> None:
    """The reverse of `stacked`."""
    for i, name in enumerate(names):
        machine.write(name, np.ascontiguousarray(values[..., i]).reshape(-1))


@handles("mma")
def multiply_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    """d = a b + c, with the fragments of "Matrix Fragments for mma.m16n8k16 with floating point type".

    Products are exact and summed in float32; the device may round these sums otherwise.
    """
    *form, result, left, right, _ = instruction.opcode[1:]
    expected = ["sync", "aligned", "m16n8k16", "row", "col"]
    if form != expected or result != "f32" or left != right or left not in ("f16", "bf16"):
        raise instruction.error("this form is not known to the interpreter")
    d, a, b, c = instruction.operands

    def step(machine: Machine) -> None:
        # [g, t, (k half, row half)] of two elements each -> rows (half, g), columns (k half, t, element)
        words = stacked(machine, a, "b32").reshape(-1, 8, 4, 2, 2).transpose(0, 4, 1, 3, 2)
        rows = from_half(np.ascontiguousarray(words).view(np.uint16), left).reshape(-1, 16, 16)
        words = stacked(machine, b, "b32").transpose(0, 1, 3, 2)  # columns g, rows (k half, t, element)
        columns = from_half(np.ascontiguousarray(words).view(np.uint16), left).reshape(-1, 8, 16)
        product = (rows @ columns.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)  # rows (half, g), columns (t, i)
        sums = stacked(machine, c, "f32") + product.transpose(0, 2, 3, 1, 4).reshape(-1, 8, 4, 4)
        deal_out(machine, d, sums)
        machine.counts.mma += machine.size() // 32

    return collective(step)


@handles("ldmatrix")
def load_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    """Lane 8m + i gives the address of row i of matrix m; lane l gets elements 2(l % 4), +1 of row (column) l / 4."""
    modifiers = list(instruction.opcode[1:])
    transposed = "trans" in modifiers
    if transposed:
        modifiers.remove("trans")
    if modifiers != ["sync", "aligned", "m8n8", "x4", "shared", "b16"]:
        raise instruction.error("this form is not known to the interpreter")
    destinations, address = instruction.operands
    assert isinstance(address, Address)
    base = reader(address.base, TYPES["u32"], instruction, kernel)

    def step(machine: Machine) -> None:
        addresses = np.broadcast_to(base(machine) + np.uint32(address.offset), machine.size())
        offsets = machine.shared.locate(addresses, machine.block[machine.group], 16)
        halves = machine.shared.load(offsets[:, None] + [0, 8], 8).view(np.uint16).reshape(-1, 4, 8, 8)
        if transposed:
            halves = halves.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32)  # (warps, matrix, row, pair)
        deal_out(machine, destinations, words.transpose(0, 2, 3, 1))
        machine.counts.ldmatrix += machine.size() // 32

    return collective(step)


@handles("shfl")
def shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    """d|p = a of another lane; without one, of its own, and p is false."""
    _, sync, mode, _ = instruction.opcode
    destination, source, *others = instruction.operands
    if sync != "sync" or len(others) != 3:
        raise instruction.error("this form is not known to the interpreter")
    names = destination if isinstance(destination, tuple) else (destination,)
    read = reader(source, TYPES["b32"], instruction, kernel)
    readers = [reader(operand, TYPES["u32"], instruction, kernel) for operand in others]

    def step(machine: Machine) -> None:
        lane = np.arange(machine.size()) % 32
        by, bound, members = (np.broadcast_to(each(machine), machine.size()).astype(np.int64) for each in readers)
        check_members(members)
        segment, clamp = bound >> 8 & 31, bound & 31
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        chosen = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        inside = chosen >= highest if mode == "up" else chosen <= highest
        chosen = np.where(inside, chosen, lane) + np.arange(machine.size()) // 32 * 32
        machine.write(names[0], np.broadcast_to(read(machine), machine.size())[chosen])
        if len(names) > 1:
            machine.write(names[1], inside)

    return collective(step)


@handles("vote")
def ballot(instruction: Instruction, kernel: Kernel) -> Step:
    """To each lane: a bit for each, set where the predicate is true."""
    if instruction.opcode != ("vote", "sync", "ballot", "b32"):
        raise instruction.error("this form is not known to the interpreter")
    destination, source, mask = instruction.operands
    votes = reader(source, TYPES["pred"], instruction, kernel)
    members = reader(mask, TYPES["u32"], instruction, kernel)

    def step(machine: Machine) -> None:
        check_members(np.broadcast_to(members(machine), machine.size()))
        bits = votes(machine).reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        machine.write(destination, np.repeat(bits.sum(axis=1).astype(np.uint32), 32))

    return collective(step)


def check_members(members: Array) -> None:
    """Whole warps have come here; each of their lanes must be one that it names itself."""
    lane = np.arange(members.size) % 32
    check(members.astype(np.int64) >> lane & 1 == 1, "a lane that its mask does not name")


@handles("bar", "barrier")
def barrier(instruction: Instruction, kernel: Kernel) -> Step:
    if instruction.opcode == ("bar", "warp", "sync"):
        members = reader(instruction.operands[0], TYPES["u32"], instruction, kernel)
        return collective(lambda machine: check_members(np.broadcast_to(members(machine), machine.size())))
    if instruction.opcode[1:] not in (("sync",), ("sync", "aligned")) or len(instruction.operands) > 1:
        raise instruction.error("this barrier is not known to the interpreter")
    return Machine.wait_for_block


@handles("bra")
def branch(instruction: Instruction, kernel: Kernel) -> Step:
    (label,) = instruction.operands
    target = kernel.labels[str(label)]
    if instruction.predicate is None:
        return lambda machine: machine.go(target)
    taken = predicate(instruction)
    return lambda machine: machine.branch(taken(machine), target)


@handles("ret", "exit")
def end(instruction: Instruction, kernel: Kernel) -> Step:
    return Machine.end


@handles("membar", "fence", "nanosleep")
def nothing(instruction: Instruction, kernel: Kernel) -> Step:
    """Memory is the same for all threads here, always."""
    return lambda machine: None
