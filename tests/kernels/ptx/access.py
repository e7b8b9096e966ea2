"""Instructions that access memory, after the PTX ISA."""

from __future__ import annotations

import numpy as np

from .instructions import TYPES, Reader, handles, reader, type_of
from .machine import Machine, Step
from .memory import UNSIGNED, Array, Fault, Memory, check
from .parser import Address, Instruction, Kernel

SPACES = ("global", "shared", "param")
FLAG = {"volatile", "relaxed", "acquire"}  # a load that others are waited for with
IGNORED = FLAG | {"release", "acq_rel", "gpu", "sys", "cta", "ca", "cg", "cs", "nc", "weak"}  # of caches, and of order


class Access:
    """Where a load or store goes: the space, and each thread's address."""

    def __init__(self, instruction: Instruction, kernel: Kernel, known: set[str]) -> None:
        modifiers = set(instruction.opcode[1:-1])
        spaces = [space for space in SPACES if space in modifiers]
        if len(spaces) != 1 or modifiers - {spaces[0]} - IGNORED - known:
            raise instruction.error("this form is not known to the interpreter")
        (self.space,) = spaces
        (address,) = (operand for operand in instruction.operands if isinstance(operand, Address))
        base = kernel.symbols.get(address.base)
        self._constant = None if base is None else base + address.offset
        if self._constant is None:
            kind = kernel.registers[address.base]
            self._base = reader(address.base, TYPES[kind.replace("f", "b")], instruction, kernel)
        self._offset = address.offset

    def addresses(self, machine: Machine) -> Array:
        if self._constant is not None:
            return np.full(machine.size(), self._constant, np.int64)
        return self._base(machine).astype(np.int64) + self._offset

    def locate(self, machine: Machine, size: int, write: bool = False) -> Array:
        """Offsets in the space's memory."""
        addresses = self.addresses(machine)
        if self.space == "global":
            machine.spins = 0 if write else machine.spins
            return machine.memory.locate(addresses, size, write)
        if self.space == "shared":
            return machine.shared.locate(addresses, machine.block[machine.group], size)
        return addresses


def memory_of(machine: Machine, space: str) -> Memory:
    return {"global": machine.memory, "shared": machine.shared, "param": machine.parameters}[space]


@handles("ld")
def load(instruction: Instruction, kernel: Kernel) -> Step:
    access = Access(instruction, kernel, {"v2", "v4"})
    kind = type_of(instruction)
    destination = instruction.operands[0]
    names = destination if isinstance(destination, tuple) else (destination,)
    reads_flag = bool(FLAG & set(instruction.opcode))

    def step(machine: Machine) -> bool | None:
        offsets = access.locate(machine, kind.itemsize * len(names))
        memory = memory_of(machine, access.space)
        values = [memory.load(offsets + i * kind.itemsize, kind.itemsize) for i in range(len(names))]
        for name, value in zip(names, values, strict=True):
            machine.write(name, value.view(kind))
        return machine.let_others_run() if reads_flag else None

    return step


@handles("st")
def store(instruction: Instruction, kernel: Kernel) -> Step:
    access = Access(instruction, kernel, {"v2", "v4"})
    kind = UNSIGNED[type_of(instruction).itemsize]
    sources = instruction.operands[1]
    names = sources if isinstance(sources, tuple) else (sources,)
    readers = [reader(name, kind, instruction, kernel) for name in names]

    def step(machine: Machine) -> None:
        offsets = access.locate(machine, kind.itemsize * len(names), write=True)
        memory = memory_of(machine, access.space)
        for i, read in enumerate(readers):
            memory.store(offsets + i * kind.itemsize, np.asarray(read(machine)))

    return step


ATOMIC = {
    "add": lambda old, operand: old + operand,
    "min": min,
    "max": max,
    "or": lambda old, operand: old | operand,
    "and": lambda old, operand: old & operand,
    "exch": lambda old, operand: operand,
    "cas": lambda old, compared, operand: operand if old == compared else old,
}


@handles("red", "atom")
def atomic(instruction: Instruction, kernel: Kernel) -> Step:
    """One thread after the other; `red` forgets what was there before."""
    (operation,) = [each for each in instruction.opcode if each in ATOMIC] or [""]
    access = Access(instruction, kernel, {operation})
    kind = type_of(instruction)
    destination = instruction.operands[0] if instruction.opcode[0] == "atom" else None
    operands = [operand for operand in instruction.operands if operand != destination and isinstance(operand, str)]
    if not operation or len(operands) != (2 if operation == "cas" else 1):
        raise instruction.error("this form is not known to the interpreter")
    readers: list[Reader] = [reader(operand, kind, instruction, kernel) for operand in operands]

    def step(machine: Machine) -> None:
        offsets = access.locate(machine, kind.itemsize, write=True)
        memory = memory_of(machine, access.space)
        values = [np.broadcast_to(read(machine), machine.size()) for read in readers]
        if operation == "add" and destination is None:
            memory.add(offsets, values[0])
            return
        before = np.empty(machine.size(), kind)
        for i in range(machine.size()):
            before[i] = memory.load(offsets[i : i + 1], kind.itemsize).view(kind)[0]
            after = np.array([ATOMIC[operation](before[i], *(value[i] for value in values))], kind)
            memory.store(offsets[i : i + 1], after.view(UNSIGNED[kind.itemsize]))
        if destination is not None:
            machine.write(destination, before)

    return step


@handles("cp")
def copy(instruction: Instruction, kernel: Kernel) -> Step:
    """cp.async: `size` bytes to shared memory, those from `taken` on being zeros; they arrive when waited for."""
    form = instruction.opcode[1:]
    if form == ("async", "commit_group"):

        def commit(machine: Machine) -> None:
            machine.committed[machine.group] += 1

        return commit
    if form == ("async", "wait_group"):
        pending = int(str(instruction.operands[0]))
        return lambda machine: machine.wait_for_copies(pending)
    if form not in (("async", "cg", "shared", "global"), ("async", "ca", "shared", "global")):
        raise instruction.error("this form is not known to the interpreter")
    destination, source, size_text, *rest = instruction.operands
    size = int(str(size_text))
    if len(rest) > 1:
        raise instruction.error("a cache policy is not known to the interpreter")
    if size not in ((16,) if form[1] == "cg" else (4, 8, 16)):
        raise instruction.error(f"cp.async.{form[1]} of {size} bytes does not exist")
    assert isinstance(destination, Address) and isinstance(source, Address)
    to = reader(destination.base, TYPES["u32"], instruction, kernel)
    origin = reader(source.base, TYPES["u64"], instruction, kernel)
    taken = reader(rest[0] if rest else size_text, TYPES["u32"], instruction, kernel)

    def start(machine: Machine) -> None:
        count = np.broadcast_to(taken(machine), machine.size())
        block = machine.block[machine.group]
        offsets = machine.shared.locate(to(machine) + np.uint32(destination.offset), block, size)
        values = np.zeros((machine.size(), size // 4), np.uint32)
        for bytes_taken in np.unique(count[count > 0]):
            some = np.flatnonzero(count == bytes_taken)
            check(count % 4 + (count > size) == 0, f"takes {bytes_taken} of {size} bytes")
            try:
                places = machine.memory.locate(origin(machine)[some] + np.uint64(source.offset), size)
                words = np.arange(0, int(bytes_taken), 4)
                values[some, : len(words)] = machine.memory.load(places[:, None] + words, 4)
            except Fault as fault:
                raise Fault(str(fault), int(some[fault.index])) from None
        machine.start_copies(offsets, values)

    return start
