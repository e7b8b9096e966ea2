"""PTX text as nvcc emits it, taken apart: kernels, their declarations, and instructions with their operands.

The grammar is that of the PTX ISA, of which this is the part that compiled kernels consist of: one entry function after
the other, each a list of declarations, labels and instructions. Braces open a scope of registers, as inline assembly
does. Debug directives and pragmas are skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s\w.]*\.align\s+\d+\s+)?(\w+)(?:\[(\d+)\])?"
)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+(\w+)(\[\d*\])?\s*;")
STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):|(?P<statement>[^;{}]+(?:\{[^{}]*\}[^;{}]*)*);)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]")

Operand = "str | Address | tuple[str, ...]"  # a register, symbol, label or number; [base + offset]; {a, b} or a|b


class PtxError(Exception):
    """A mistake of a kernel, or an instruction that is not known here; names the line."""


@dataclass(frozen=True)
class Address:
    """``[base + offset]``"""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``opcode`` is its name at the dots: ``("ld", "shared", "v2", "f32")``."""

    line: int
    text: str
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None = None  # a register: only threads in which it is true (or not, if negated) take part
    negated: bool = False

    def error(self, message: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: {self.text}: {message}")


@dataclass
class Kernel:
    """One entry function."""

    name: str
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    parameters: dict[str, int] = field(default_factory=dict)  # name: offset in bytes
    shared: dict[str, int] = field(default_factory=dict)  # name: address in the block's shared memory
    static_shared_bytes: int = 0  # what a launch gives follows them
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name: index of an instruction

    @cached_property
    def symbols(self) -> dict[str, int]:
        return self.parameters | self.shared


def parse(text: str) -> dict[str, Kernel]:
    """Returns the kernels of a PTX file by name, as it is mangled."""
    text = re.sub(r"//.*", "", text)
    entries = list(ENTRY.finditer(text))
    ends = [entry.start() for entry in entries[1:]] + [len(text)]
    shared = SHARED.findall(text)
    return {entry[1]: _kernel(text, entry, end, shared) for entry, end in zip(entries, ends, strict=True)}


def _kernel(text: str, entry: re.Match[str], end: int, shared: list[tuple[str, ...]]) -> Kernel:
    kernel = Kernel(entry[1])
    offset = 0
    for alignment, kind, name, count in PARAMETER.findall(entry[2]):
        size = _size(kind)
        offset = _round_up(offset, int(alignment or size))
        kernel.parameters[name] = offset
        offset += size * int(count or 1)

    body = text[entry.end() : end]
    dynamic = []
    for alignment, kind, name, count in shared:
        if not re.search(rf"\b{name}\b", body):
            continue
        if count == "[]":  # what is given at launch
            dynamic.append(name)
            continue
        kernel.shared[name] = _round_up(kernel.static_shared_bytes, int(alignment))
        kernel.static_shared_bytes = kernel.shared[name] + _size(kind) * int(count.strip("[]") or 1)
    kernel.static_shared_bytes = _round_up(kernel.static_shared_bytes, 128)
    kernel.shared |= dict.fromkeys(dynamic, kernel.static_shared_bytes)

    _read_body(kernel, body, first_line=text.count("\n", 0, entry.end()) + 1)
    return kernel


def _read_body(kernel: Kernel, body: str, first_line: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # inner registers: their name in the kernel
    position = 0
    while scopes:
        found = STATEMENT.match(body, position)
        if found is None:
            raise PtxError(f"PTX line {first_line + body.count(chr(10), 0, position)}: not understood")
        position = found.end()
        if found["brace"] == "{":
            scopes.append(dict(scopes[-1]))
        elif found["brace"] == "}":
            scopes.pop()
        elif found["label"]:
            kernel.labels[found["label"]] = len(kernel.code)
        elif declared := REGISTERS.match(found["statement"]):
            _declare(kernel, declared[1], declared[2], scopes[-1], inner=len(scopes) > 1)
        elif not found["statement"].startswith("."):
            line = first_line + body.count("\n", 0, found.start("statement"))
            kernel.code.append(_instruction(found["statement"].strip(), line, scopes[-1]))


def _declare(kernel: Kernel, kind: str, names: str, scope: dict[str, str], inner: bool) -> None:
    for name in (part.strip() for part in names.split(",")):
        several = re.fullmatch(r"(%\w+)<(\d+)>", name)
        if several:
            kernel.registers |= {f"{several[1]}{i}": kind for i in range(int(several[2]))}
        else:
            unique = f"{name}.{len(kernel.registers)}" if inner else name
            scope[name] = unique
            kernel.registers[unique] = kind


def _instruction(text: str, line: int, scope: dict[str, str]) -> Instruction:
    def operand(text: str) -> Operand:
        if text.startswith("["):
            found = ADDRESS.fullmatch(text)
            if found is None:
                raise PtxError(f"PTX line {line}: address {text} not understood")
            return Address(scope.get(found[1], found[1]), int(found[2] or 0))
        if text.startswith("{") or "|" in text:
            return tuple(scope.get(name, name) for name in re.split(r"[\s,|]+", text.strip("{} ")))
        return scope.get(text, text)

    found = INSTRUCTION.fullmatch(text)
    if found is None:
        raise PtxError(f"PTX line {line}: {text}: not understood")
    predicate = scope.get(found[2], found[2]) if found[2] else None
    operands = tuple(operand(part) for part in OPERAND.findall(found[4]))
    return Instruction(line, " ".join(text.split()), tuple(found[3].split(".")), operands, predicate, found[1] == "!")


def _size(kind: str) -> int:
    return int(re.sub(r"\D", "", kind)) // 8


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
