"""Compiles the CUDA kernels to PTX and runs that on torch tensors, in the interpreter of `ptx/`.

The host's part of the kernels (which kernel with which grid) is the emulator's library; only its launches come here.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

import ptx
import torch
from emulated import ELEMENTS, KERNELS, REPOSITORY, Counters, Run, span_bytes
from emulated import Kernels as Emulated

BUILD = REPOSITORY / "build" / "ptx"
ARCHITECTURE = 80


def nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_to_ptx(source: Path, architecture: int, *defines: str) -> str:
    """The text that nvcc makes of a .cu file; kept until a source in its folder changes."""
    command = ["nvcc", "-std=c++17", "-O3", "-ptx", f"-arch=sm_{architecture}", *(f"-D{each}" for each in defines)]
    sources = sorted([source, *source.parent.glob("*.cuh"), *KERNELS.glob("*.cuh")])
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources) + " ".join(command).encode())
    text = BUILD / f"{source.stem}_{digest.hexdigest()[:16]}.ptx"
    if not text.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = text.with_suffix(f".{id(digest)}.tmp")
        subprocess.run([*command, f"-I{KERNELS}", "-o", str(unfinished), str(source)], check=True)
        unfinished.rename(text)
    return text.read_text()


class _Elsewhere(ctypes.Structure):
    """`simt::Elsewhere`"""

    launch = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    )
    fill_zero = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
    _fields_ = [("to_launch", launch), ("to_fill_zero", fill_zero)]


class Kernels(Emulated):
    """The kernels of one element type and head dimension, as PTX.

    They are called as those of the emulator are; `seed` and `truncate` mean nothing here. A mistake is the run's log.
    """

    def __init__(
        self, dtype: torch.dtype, head_dim: int, architecture: int = ARCHITECTURE, kernels: Path = KERNELS
    ) -> None:
        super().__init__(dtype, head_dim)
        defines = (f"ELEMENT={ELEMENTS[dtype]}", f"HEAD_DIM={head_dim}")
        self._kernels = ptx.parse(compile_to_ptx(kernels / "kernels.cu", architecture, *defines))
        self._programs: dict[str, ptx.Program] = {}
        self.resident = 32  # blocks in flight at once

    def _start(self, *arguments: object) -> None:
        super()._start(*arguments)
        *_, cu_seqlens, inputs, outputs = arguments
        given = dict(inputs) if cu_seqlens is None else inputs | {"cu_seqlens": cu_seqlens}
        self._memory = ptx.Global(
            [
                ptx.Buffer(name, tensor.data_ptr(), span_bytes(tensor), writable)
                for writable, tensors in ((False, given), (True, outputs))
                for name, tensor in tensors.items()
            ]
        )
        self._log, self._launches = "", []
        # Kept for as long as they may be called.
        self._callbacks = _Elsewhere(_Elsewhere.launch(self._launch), _Elsewhere.fill_zero(self._memory.set_written))
        self._library.emulator_hand_launches_to(self._callbacks)

    def _finish(self, run: Run) -> Run:
        self._library.emulator_hand_launches_to(_Elsewhere())
        run.log, run.launches = self._log, self._launches
        return run

    def _launch(self, name: bytes, blocks: int, threads: int, shared_bytes: int, parameters: int, size: int) -> None:
        """Called by the host's part; what is raised here would be lost on the way back."""
        if self._log:
            return
        launch = ptx.Launch(blocks, threads, shared_bytes, ctypes.string_at(parameters, size), self.resident)
        self._memory.fetch()
        counters = Counters(blocks=blocks)
        try:
            counters.mma = ptx.run(self._program(name.decode()), self._memory, launch).mma
        except Exception as error:
            self._log = f"{name.decode()}: {error}\n"
            counters.errors = 1
        self._launches.append(counters)
        self._memory.give_back()

    def _program(self, name: str) -> ptx.Program:
        if name not in self._programs:
            self._programs[name] = ptx.compile_kernel(self._kernels[name])
        return self._programs[name]


@cache
def kernels(dtype: torch.dtype, head_dim: int, architecture: int = ARCHITECTURE) -> Kernels:
    return Kernels(dtype, head_dim, architecture)
