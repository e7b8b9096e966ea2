"""Compiles the CUDA kernels to PTX and runs that on torch tensors, in the interpreter of `ptx/`.

The host's part of the kernels (which kernel with which grid) is the emulator's library; only its launches come here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import ptx
import torch
from cases import Case, fits_short
from emulated import ELEMENTS, KERNELS, REPOSITORY, Counters, Run, span_bytes
from emulated import Kernels as Emulated
from emulated import ShortKernels as EmulatedShort
from emulated import WavefrontKernels as EmulatedWavefront

from twicing_core.build_cuda import FLAGS, VIRTUAL_ARCHITECTURE, nvcc

BUILD = REPOSITORY / "build" / "ptx"
SOURCES = ("kernels.cu",)  # which instantiate the kernels


def compile_to_ptx(source: Path, *defines: str) -> Path:
    """What nvcc makes of a .cu file, for every architecture the same; kept until a source in its folder changes."""
    command = [str(nvcc()), *FLAGS, "-ptx", f"-arch={VIRTUAL_ARCHITECTURE}", "-Werror=all-warnings"]
    command += [f"-D{each}" for each in defines]
    sources = sorted([source, *source.parent.glob("*.cuh"), *KERNELS.glob("*.cuh")])
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources) + " ".join(command).encode())
    text = BUILD / f"{source.stem}_{digest.hexdigest()[:16]}.ptx"
    if not text.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = text.with_suffix(f".{os.getpid()}.{id(digest)}.tmp")
        subprocess.run([*command, f"-I{KERNELS}", "-o", str(unfinished), str(source)], check=True)
        unfinished.rename(text)
    return text


@dataclass(frozen=True)
class Argument:
    """An array that a kernel gets the address of. Plain arrays may be read and written."""

    array: np.ndarray
    writable: bool
    written: bool


def run_on_arrays(
    kernel: ptx.Kernel,
    *arguments: Argument | np.ndarray | bool | int | float,
    blocks: int = 1,
    threads: int = 32,
    shared_bytes: int = 0,
    resident: int = 32,
    seed: int = 0,
) -> ptx.Counts:
    """Runs one kernel: arrays by address, numbers as C's bool, int and float. Raises ptx.PtxError."""
    arrays = [Argument(each, True, True) if isinstance(each, np.ndarray) else each for each in arguments]
    arrays = [each for each in arrays if isinstance(each, Argument)]
    memory = ptx.Global([ptx.Buffer("", each.array.ctypes.data, each.array.nbytes, each.writable) for each in arrays])
    for each in arrays:
        if each.written:
            memory.set_written(each.array.ctypes.data, each.array.nbytes)
    memory.fetch()
    parameters = b""
    for offset, argument in zip(kernel.parameters.values(), arguments, strict=True):
        parameters = parameters.ljust(offset, b"\0") + _bytes_of(argument)
    launch = ptx.Launch(blocks, threads, shared_bytes, parameters, resident, seed)
    counts = ptx.run(ptx.compile_kernel(kernel), memory, launch)
    memory.give_back()
    return counts


def _bytes_of(argument: Argument | np.ndarray | bool | int | float) -> bytes:
    if isinstance(argument, Argument):
        argument = argument.array
    if isinstance(argument, np.ndarray):
        return struct.pack("Q", argument.ctypes.data)
    return struct.pack({bool: "?", int: "i", float: "f"}[type(argument)], argument)


class _Elsewhere(ctypes.Structure):
    """`simt::Elsewhere`"""

    launch = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    )
    fill_zero = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
    _fields_ = [("to_launch", launch), ("to_fill_zero", fill_zero)]


class AsPtx:
    """What makes the emulator's kernels those that nvcc compiled, when it comes before their class.

    They are called as those of the emulator are, but `truncate` means nothing here. A mistake is the run's log.
    """

    resident = 32  # blocks in flight at once

    def __init__(
        self,
        dtype: torch.dtype,
        head_dim: int,
        *arguments: object,
        kernels: Path = KERNELS,
    ) -> None:
        super().__init__(dtype, head_dim, *arguments)
        defines = (f"ELEMENT={ELEMENTS[dtype]}", f"HEAD_DIM={head_dim}")
        self._kernels: dict[str, ptx.Kernel] = {}
        for source in SOURCES:
            self._kernels |= ptx.parse(compile_to_ptx(kernels / source, *defines).read_text())
        self._programs: dict[str, ptx.Program] = {}

    def _start(self, *arguments: object) -> None:
        super()._start(*arguments)
        seed, *_, cu_seqlens, inputs, outputs = arguments
        given = dict(inputs) if cu_seqlens is None else inputs | {"cu_seqlens": cu_seqlens}
        self._memory = ptx.Global(
            [
                ptx.Buffer(name, tensor.data_ptr(), span_bytes(tensor), writable)
                for writable, tensors in ((False, given), (True, outputs))
                for name, tensor in tensors.items()
            ]
        )
        self._seed, self._log, self._launches = seed, "", []
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
        launch = ptx.Launch(
            blocks, threads, shared_bytes, ctypes.string_at(parameters, size), self.resident, self._seed
        )
        self._memory.fetch()
        counters = Counters(blocks=blocks)
        try:
            counters.mma = ptx.run(self._compiled(name.decode()), self._memory, launch).mma
        except Exception as error:
            self._log = f"{name.decode()}: {error}\n"
            counters.errors = 1
        self._launches.append(counters)
        self._memory.give_back()

    def _compiled(self, name: str) -> ptx.Program:
        if name not in self._kernels:
            raise ptx.PtxError(f"not among the kernels that {', '.join(SOURCES)} instantiates")
        if name not in self._programs:
            self._programs[name] = ptx.compile_kernel(self._kernels[name])
        return self._programs[name]


class Kernels(AsPtx, Emulated):
    """Those of one element type and head dimension."""


class ShortKernels(AsPtx, EmulatedShort):
    """Those that take a head in one block."""


class WavefrontKernels(AsPtx, EmulatedWavefront):
    """Those for causal attention in one launch."""


def record_launches(dtype: torch.dtype, head_dim: int, case: Case) -> dict[str, ptx.Launch]:
    """How the host launches each kernel for a problem, by symbol; nothing is run."""
    libraries, launches = [Emulated(dtype, head_dim)], {}
    if fits_short(case):
        libraries.append(EmulatedShort(dtype, head_dim))
    if head_dim <= 128:
        libraries += [EmulatedWavefront(dtype, head_dim, lag) for lag in (0, 1)]

    def record(name: bytes, blocks: int, threads: int, shared_bytes: int, parameters: int, size: int) -> None:
        launches[name.decode()] = ptx.Launch(blocks, threads, shared_bytes, b"")

    callbacks, arguments = _Elsewhere(_Elsewhere.launch(record), _Elsewhere.fill_zero()), case.arguments()
    for library in libraries:
        library._library.emulator_hand_launches_to(callbacks)
        forward = library.forward(*case.inputs, **arguments)
        if head_dim <= 128:
            for deterministic in (False, True):
                library.backward(forward, case.grad_output, *case.inputs, **arguments, deterministic=deterministic)
        library._library.emulator_hand_launches_to(_Elsewhere())
    return launches


@cache
def kernels(dtype: torch.dtype, head_dim: int) -> Kernels:
    return Kernels(dtype, head_dim)


@cache
def short(dtype: torch.dtype, head_dim: int) -> ShortKernels:
    return ShortKernels(dtype, head_dim)


@cache
def wavefront(dtype: torch.dtype, head_dim: int, lag: int) -> WavefrontKernels:
    return WavefrontKernels(dtype, head_dim, lag)
