"""What nvcc makes of the kernels, against budgets: registers, spills, shared memory, and the code of the main loops.

    python tests/kernels/compiled.py [--head-dims 64,128] [--architectures 80,90]

prints the numbers, and what follows from them by arithmetic: blocks in flight, how long a step keeps each pipe busy, and
the throughput that the busiest pipe allows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import costs
import sass
import torch
from cases import HEAD_DIMS, Case
from emulated import KERNELS
from interpreted import compile_to_ptx, nvcc, record_launches

from twicing_core.build_cuda import FLAGS

ARCHITECTURES = tuple(costs.MULTIPROCESSORS)

# Budgets. Of a block on the smallest of the architectures, which are 86, 89 and 120:
SHARED_BYTES = 99 * 1024
# By kernel and head_dim, on any architecture: what nvcc 13.0 takes at most, rounded up to the 8 that they are given by.
REGISTERS = {
    "forward_kernel<0>": {16: 152, 32: 176, 64: 255, 96: 216, 128: 255, 256: 255},
    "forward_kernel<1>": {16: 144, 32: 168, 64: 240, 96: 232, 128: 255, 256: 255},
    "backward_u": {16: 96, 32: 96, 64: 128, 96: 152, 128: 184},
    "backward_keys<0>": {16: 152, 32: 144, 64: 184, 96: 216, 128: 255},
    "backward_keys<1>": {16: 184, 32: 160, 64: 216, 96: 248, 128: 255},
    "backward_query": {16: 136, 32: 120, 64: 152, 96: 160, 128: 184},
    "round_query": dict.fromkeys(HEAD_DIMS, 32),
    "short_forward<128>": {16: 152, 32: 168, 64: 216},
    "short_forward<256>": dict.fromkeys(HEAD_DIMS, 255),
    "short_backward<128>": dict.fromkeys(HEAD_DIMS, 255),
    "short_backward<256>": dict.fromkeys(HEAD_DIMS, 255),
    "wavefront_forward<0>": {16: 192, 32: 240, 64: 255, 96: 208, 128: 248},
    "wavefront_forward<1>": {16: 136, 32: 160, 64: 200, 96: 216, 128: 255},
    "wavefront_backward<0>": {16: 192, 32: 184, 64: 255, 96: 224, 128: 255},
    "wavefront_backward<1>": {16: 192, 32: 200, 64: 255, 96: 232, 128: 255},
}

COLUMNS = ("kernel", "head_dim", "sm", "registers", "spilled", "shared KB", "blocks/SM", "HMMA", "LDSM", "EX2")
COLUMNS += ("instructions", "tensor", "shared", "EX2", "issue")
# Not of the wavefront kernels: much of their main loops' code is run on the diagonal only, so it cannot be counted so.
PHASES = {
    "forward": ("forward_kernel<0>", "forward_kernel<1>"),
    "backward, fast": ("backward_u", "backward_keys<1>"),
    "backward, deterministic": ("backward_u", "backward_keys<0>", "backward_query"),
}

SYMBOL = re.compile(r"_ZN7twicing(\d+)(\w+)")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str  # and template arguments after the head dimension: "forward_kernel<0>"
    dtype: str
    head_dim: int
    architecture: int
    registers: int
    spilled_bytes: int  # of stores: what is never stored is not loaded
    static_shared_bytes: int
    loop: sass.Loop | None  # None: the kernel does not multiply

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.head_dim} on sm_{self.architecture}"


def name_of(symbol: str) -> str:
    """``forward_kernel<0>`` of ``_ZN7twicing14forward_kernelIN3ptx4Bf16ELi64ELNS_4PassE0EEEvNS_13ForwardParamsE``"""
    found = SYMBOL.match(symbol)
    assert found is not None, symbol
    length = int(found[1])
    arguments = re.findall(r"L(?:[a-z]|NS_\w+?E)(\d+)E", found[2][length:])[1:]
    return found[2][:length] + (f"<{','.join(arguments)}>" if arguments else "")


def compile_kernels(dtype: str, head_dim: int, architecture: int) -> list[Kernel]:
    """Compiles all kernels of a type and head dimension; reads what ptxas says of them, and their code."""
    defines = (f"ELEMENT={dtype.capitalize()}", f"HEAD_DIM={head_dim}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [str(nvcc()), *FLAGS, "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-o", str(cubin)]
        ptx = compile_to_ptx(KERNELS / "kernels.cu", *defines)
        result = subprocess.run([*command, str(ptx)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        loops = sass.main_loops(cubin)
    kernels = []
    for part in result.stderr.split("Compiling entry function")[1:]:
        symbol = part.split("'")[1]
        numbers = [
            _number(each, part) for each in (r"Used (\d+) reg", r"(\d+) bytes spill stores", r"(\d+) bytes smem")
        ]
        kernels.append(Kernel(name_of(symbol), dtype, head_dim, architecture, *numbers, loops[symbol]))
    return kernels


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


@cache
def shared_bytes(head_dim: int) -> dict[str, int]:
    """What the host gives the kernels, by name."""
    cases = [Case("bf16", head_dim, seq, causal=True) for seq in (1, 129)]  # of which the short ones have two kernels
    launches = [record_launches(torch.bfloat16, head_dim, case).items() for case in cases]
    return {name_of(symbol): launch.shared_bytes for items in launches for symbol, launch in items}


def check(kernel: Kernel) -> None:
    """Raises AssertionError where a budget is exceeded, or the main loop is not what the tiling says."""
    assert kernel.spilled_bytes == 0, f"{kernel} spills {kernel.spilled_bytes} bytes"
    assert kernel.name in REGISTERS, f"{kernel.name}: its registers are to be given a budget"
    assert kernel.registers <= REGISTERS[kernel.name][kernel.head_dim], f"{kernel} takes {kernel.registers} registers"
    given = shared_bytes(kernel.head_dim)[kernel.name] + kernel.static_shared_bytes
    assert given <= SHARED_BYTES, f"{kernel} takes {given} bytes of shared memory"
    if kernel.loop is None:
        return
    assert kernel.name in costs.STEPS, f"{kernel.name}: its main loop's instructions are to be told in costs.py"
    step, found = costs.STEPS[kernel.name](kernel.head_dim), kernel.loop.opcodes
    expected = {"HMMA": step.in_code("mma"), "LDSM": step.in_code("ldmatrix"), "BAR": step.barriers}
    expected["MUFU.EX2"] = step.exponentials
    for opcode, count in expected.items():
        assert found[opcode] == count, f"{kernel}: {found[opcode]} {opcode} in the main loop, not {count}"
    assert found["LDGSTS"] > 0, f"{kernel}: nothing is copied while the main loop computes"
    assert found["LDL"] + found["STL"] == 0, f"{kernel}: local memory in the main loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--architectures", default="80,90")
    arguments = parser.parse_args()
    head_dims, architectures = (
        [int(n) for n in text.split(",")] for text in (arguments.head_dims, arguments.architectures)
    )
    kernels = [
        kernel
        for head_dim in head_dims
        for architecture in architectures
        for kernel in compile_kernels("bf16", head_dim, architecture)
        if kernel.loop is not None
    ]
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for kernel in kernels:
        print(row(kernel))
    print("\n| | head_dim | device | of mma.sync's peak | TFLOP/s |\n|---|---|---|---|---|")
    for head_dim in head_dims:
        for architecture in set(architectures) & set(costs.PEAKS):
            for name, parts in PHASES.items():
                chosen = [k for k in kernels if (k.head_dim, k.architecture) == (head_dim, architecture)]
                share = ceiling([kernel for kernel in chosen if kernel.name in parts])
                device, peak = costs.PEAKS[architecture]
                print(f"| {name} | {head_dim} | {device} | {share:.0%} | {share * peak:.0f} |")


def ceiling(kernels: list[Kernel]) -> float:
    """The share of time in which tensor cores work if, in every step, the busiest pipe is never idle."""
    costs_of = [pipes(kernel) for kernel in kernels]
    return sum(cycles["tensor"] for cycles in costs_of) / sum(max(cycles.values()) for cycles in costs_of)


def pipes(kernel: Kernel) -> dict[str, float]:
    assert kernel.loop is not None
    step = costs.STEPS[kernel.name](kernel.head_dim)
    return costs.cycles(step, kernel.architecture, kernel.loop.run(step.trips()))


def row(kernel: Kernel) -> str:
    """A line of the table: cycles are of a block's step, a pipe of an SM each."""
    assert kernel.loop is not None
    step, given = costs.STEPS[kernel.name](kernel.head_dim), shared_bytes(kernel.head_dim)[kernel.name]
    blocks = costs.blocks_in_flight(kernel.architecture, step.threads, kernel.registers, given)
    instructions = kernel.loop.run(step.trips())
    opcodes = [kernel.loop.opcodes[name] for name in ("HMMA", "LDSM", "MUFU.EX2")]
    busy = [f"{cycles:.0f}" for cycles in pipes(kernel).values()]
    numbers = [kernel.registers, kernel.spilled_bytes, f"{given / 1024:.0f}", blocks, *opcodes, instructions, *busy]
    cells = [kernel.name, kernel.head_dim, kernel.architecture, *numbers]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    main()
