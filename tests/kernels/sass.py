"""The machine code of a compiled kernel: its main loop, and what instructions that consists of."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

FUNCTION = re.compile(r"\.text\.(\S+):")
LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(MUFU\.EX2|[A-Z][A-Z0-9_]*)\b[^;]*?(?:`\((\.L_x_\d+)\))?\s*;"
)


def nvdisasm() -> Path:
    """NVIDIA's disassembler: of the toolkit, or of its package on PyPI."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    for file in metadata.files("nvidia-cuda-nvdisasm") or ():
        if file.name == "nvdisasm":
            return Path(str(file.locate()))
    raise FileNotFoundError("nvdisasm is neither on PATH nor in the package nvidia-cuda-nvdisasm")


@dataclass(frozen=True)
class Loop:
    """Instructions from a label to a branch back to it."""

    opcodes: Counter[str]
    inner: tuple[Loop, ...]  # loops right inside of it, each of whose opcodes are counted once above

    def run(self, trips: dict[str, int]) -> int:
        """Instructions of one turn; a loop inside that has one of these opcodes turns so many times, others once."""
        repeated = sum((trips.get(_first_of(loop, trips), 1) - 1) * loop.run(trips) for loop in self.inner)
        return self.opcodes.total() + repeated


def _first_of(loop: Loop, opcodes: dict[str, int]) -> str:
    return next((opcode for opcode in opcodes if loop.opcodes[opcode]), "")


def main_loops(cubin: Path) -> dict[str, Loop | None]:
    """By kernel, the innermost loop with all its tensor-core instructions; None if it has none."""
    return {name: _main_loop(lines) for name, lines in _functions(disassemble(cubin))}


def disassemble(cubin: Path) -> str:
    return subprocess.run([str(nvdisasm()), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def _functions(text: str) -> Iterator[tuple[str, list[str]]]:
    parts = FUNCTION.split(text)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        yield name, body.splitlines()


def _main_loop(lines: list[str]) -> Loop | None:
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := INSTRUCTION.match(line):
            opcodes.append(instruction[1])
            if instruction[1] == "BRA" and instruction[2] in labels:
                spans.append((labels[instruction[2]], len(opcodes)))
    spans = [max((other for other in spans if other[0] == begin), key=lambda span: span[1]) for begin, _ in spans]
    spans = sorted(set(spans), key=lambda span: span[1] - span[0])
    products = opcodes.count("HMMA")
    complete = [span for span in spans if opcodes[slice(*span)].count("HMMA") == products > 0]
    return _loop(complete[0], spans, opcodes) if complete else None


def _loop(span: tuple[int, int], spans: list[tuple[int, int]], opcodes: list[str]) -> Loop:
    inside = [other for other in spans if other != span and span[0] <= other[0] and other[1] <= span[1]]
    direct = [one for one in inside if not any(one != two and two[0] <= one[0] and one[1] <= two[1] for two in inside)]
    return Loop(Counter(opcodes[slice(*span)]), tuple(_loop(one, spans, opcodes) for one in sorted(direct)))
