"""What nvcc makes of the kernels: registers, spills and shared memory, against budgets."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

from cases import HEAD_DIMS
from emulated import KERNELS

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SPILLED_BYTES = dict.fromkeys(HEAD_DIMS, 0) | {256: 32}  # the budget of every kernel, by head_dim
SHARED_BYTES = 99 * 1024  # what a block may have on the smallest of them: 86, 89 and 120
KERNEL_NAME = re.compile(r"(forward_kernel|backward_u|backward_keys|backward_query|round_query)")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    dtype: str
    head_dim: int
    architecture: int
    registers: int
    spilled_bytes: int  # of stores: what is never stored is not loaded
    static_shared_bytes: int

    def __str__(self) -> str:
        return f"{self.name}<{self.dtype}, {self.head_dim}> on sm_{self.architecture}"


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_kernels(dtype: str, head_dim: int, architecture: int) -> list[Kernel]:
    """Compiles all kernels of a type and head dimension, and reads what ptxas says of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc()), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]
        command += [f"-DELEMENT={dtype.capitalize()}", f"-DHEAD_DIM={head_dim}", "-o", f"{folder}/kernels.cubin"]
        result = subprocess.run([*command, str(KERNELS / "kernels.cu")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return [_read(part, dtype, head_dim, architecture) for part in result.stderr.split("Compiling entry function")[1:]]


def _read(ptxas: str, dtype: str, head_dim: int, architecture: int) -> Kernel:
    def number(pattern: str) -> int:
        found = re.search(pattern, ptxas)
        return int(found[1]) if found else 0

    name = KERNEL_NAME.search(ptxas)
    assert name is not None, ptxas
    variant = "" if name[1] != "forward_kernel" else ("_first" if "PassE0E" in ptxas else "_second")
    if name[1] == "backward_keys":
        variant = "_adding_query" if "Lb1E" in ptxas else ""
    return Kernel(
        name[1] + variant,
        dtype,
        head_dim,
        architecture,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes smem"),
    )


def check(kernel: Kernel) -> None:
    """Raises AssertionError where a budget is exceeded."""
    assert kernel.spilled_bytes <= SPILLED_BYTES[kernel.head_dim], f"{kernel} spills {kernel.spilled_bytes} bytes"
    assert kernel.static_shared_bytes == 0, f"{kernel}: shared memory is to be given at launch"
    assert kernel.registers <= 255
