"""Builds the CUDA kernels for the CPU, and runs them on torch tensors under the emulator's checks."""

from __future__ import annotations

import ctypes
import hashlib
import math
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
KERNELS = REPOSITORY / "twicing_core" / "csrc" / "cuda"
BUILD = REPOSITORY / "build" / "emulator"
MACHINE = ("simt.cpp", "memory.cpp")  # the emulator itself, which every program needs
COMPILE = ["g++", "-std=c++20", "-mavx2", "-mfma", "-mf16c", "-fPIC", "-shared"]
OPTIONS = ("-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas")  # the pragmas are nvcc's
ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}


def build(program: str, *defines: str, kernels: Path = KERNELS, options: tuple[str, ...] = OPTIONS) -> Path:
    """Compiles one of the emulator's .cpp files; the result is kept until a source changes.

    Args:
        program: the name of the file.
        defines: preprocessor definitions, ``NAME=VALUE``.
        kernels: the folder of the kernels, or of a changed copy.
        options: of the compiler: quickly compiled or quickly run.
    """
    sources = sorted([*EMULATOR.glob("*.h"), *EMULATOR.glob("*.cpp"), *kernels.glob("*.cuh")])
    digest = hashlib.sha256(
        b"\0".join(path.read_bytes() for path in sources) + " ".join([*COMPILE, *options, *defines]).encode()
    )
    library = BUILD / f"{Path(program).stem}_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{id(digest)}.tmp")
        command = [
            *COMPILE,
            *options,
            *(f"-D{define}" for define in defines),
            f"-I{EMULATOR}",
            f"-I{kernels}",
            "-o",
            str(unfinished),
        ]
        subprocess.run([*command, *(str(EMULATOR / name) for name in (program, *MACHINE))], check=True)
        unfinished.rename(library)
    return library


class _Tensor(ctypes.Structure):
    """`twicing::Tensor`"""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]

    @classmethod
    def of(cls, tensor: Tensor) -> _Tensor:
        assert tensor.stride(3) == 1
        return cls(tensor.data_ptr(), (ctypes.c_int64 * 3)(*tensor.stride()[:3]))


class _Problem(ctypes.Structure):
    """`twicing::Problem`"""

    _fields_ = [(name, ctypes.c_int) for name in ("batch", "heads", "key_heads", "seq", "documents")]
    _fields_ += [("cu_seqlens", ctypes.c_void_p), ("scale", ctypes.c_float), ("causal", ctypes.c_bool)]


class _ForwardParams(ctypes.Structure):
    """`twicing::ForwardParams`"""

    _fields_ = [("problem", _Problem)]
    _fields_ += [(name, _Tensor) for name in ("query", "key", "value", "u", "output")]
    _fields_ += [("lse", ctypes.c_void_p), ("workspace", ctypes.c_void_p)]  # the latter of the wavefront only


class _BackwardParams(ctypes.Structure):
    """`twicing::BackwardParams`"""

    _inputs = ("query", "key", "value", "output", "u", "grad_output")
    _outputs = ("grad_u", "grad_query", "grad_key", "grad_value")
    _fields_ = [("problem", _Problem)]
    _fields_ += [(name, _Tensor) for name in (*_inputs, *_outputs)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("lse", "delta", "grad_query_sum", "workspace")]


class Counters(ctypes.Structure):
    """`simt::Counters`: what one launch did."""

    _names = (
        *("blocks", "barriers", "mma", "exp2_lanes", "ldmatrix", "shared_stores", "shared_loads"),
        *("ldmatrix_passes", "shared_store_passes", "shared_load_passes"),
        *("global_read_bytes", "global_written_bytes", "errors"),
    )
    _fields_ = [(name, ctypes.c_uint64) for name in _names]


@dataclass
class Run:
    """What a run left: tensors by name, the emulator's complaints, and what each launch did."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    log: str = ""
    launches: list[Counters] = field(default_factory=list)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def address(self, name: str) -> int | None:
        return self.tensors[name].data_ptr() if name in self.tensors else None

    @property
    def errors(self) -> int:
        return sum(launch.errors for launch in self.launches)

    def total(self, counter: str) -> int:
        return sum(getattr(launch, counter) for launch in self.launches)


class Kernels:
    """The kernels of one element type and head dimension."""

    _program = "kernels.cpp"
    _forward = "run_forward"

    def __init__(
        self, dtype: torch.dtype, head_dim: int, kernels: Path = KERNELS, options: tuple[str, ...] = OPTIONS
    ) -> None:
        defines = (f"ELEMENT={ELEMENTS[dtype]}", f"HEAD_DIM={head_dim}")
        path = build(self._program, *defines, kernels=kernels, options=options)
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_log.restype = ctypes.c_char_p
        self._library.emulator_counters.restype = ctypes.POINTER(Counters)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        seed: int = 0,
        resident: int = 1,
        truncate: bool = False,
    ) -> Run:
        """Returns `output`, `u` and `lse`, as `twicing::forward` does.

        Args:
            query: (batch, heads, seq, head_dim), any strides that the kernels take.
            key, value: (batch, key_heads, seq, head_dim).
            seed: 0, or a random schedule.
            resident: how many blocks are in flight at a time.
            truncate: whether tensor cores round towards zero.
        """
        problem = _problem(query, key, is_causal, scale, cu_seqlens)
        run = Run(
            {"u": poison(query), "output": poison(query), "lse": query.new_full(query.shape[:3], math.nan).float()}
        )
        run.tensors |= self._workspace(problem)
        self._start(seed, resident, truncate, cu_seqlens, {"query": query, "key": key, "value": value}, run.tensors)
        tensors = [_Tensor.of(tensor) for tensor in (query, key, value, run["u"], run["output"])]
        params = _ForwardParams(problem, *tensors, run["lse"].data_ptr(), run.address("workspace"))
        getattr(self._library, self._forward)(ctypes.byref(params))
        return self._finish(run)

    def backward(
        self,
        forward: Run,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        deterministic: bool = False,
        is_causal: bool = False,
        scale: float | None = None,
        cu_seqlens: Tensor | None = None,
        seed: int = 0,
        resident: int = 1,
        truncate: bool = False,
    ) -> Run:
        """Returns `grad_query`, `grad_key` and `grad_value` of what `forward` returned. See there.

        Args:
            deterministic: whether dQ has a kernel of its own, instead of being summed in any order.
        """
        problem = _problem(query, key, is_causal, scale, cu_seqlens)
        inputs = {"query": query, "key": key, "value": value, "output": forward["output"], "u": forward["u"]}
        inputs |= {"grad_output": grad_output, "lse": forward["lse"]}
        run = Run({"grad_query": poison(query), "grad_key": poison(key), "grad_value": poison(value)})
        run.tensors |= {"grad_u": poison(query), "delta": torch.full_like(forward["lse"], math.nan)}
        if not deterministic:
            run.tensors["grad_query_sum"] = poison(query).float()
        run.tensors |= self._workspace(problem)
        self._start(seed, resident, truncate, cu_seqlens, inputs, run.tensors)
        by_name = inputs | run.tensors
        tensors = [_Tensor.of(by_name[name]) for name in (*_BackwardParams._inputs, *_BackwardParams._outputs)]
        pointers = [run.address(name) for name in ("delta", "grad_query_sum", "workspace")]
        params = _BackwardParams(problem, *tensors, forward.address("lse"), *pointers)
        self._library.run_backward(ctypes.byref(params))
        return self._finish(run)

    def shared_bytes(self) -> dict[str, int]:
        """What the kernels of each direction take of shared memory, at most."""
        names = ("forward_shared_bytes", "backward_shared_bytes")
        return {name: getattr(self._library, name)() for name in names}

    def _workspace(self, problem: _Problem) -> dict[str, Tensor]:
        return {}

    def _start(
        self,
        seed: int,
        resident: int,
        truncate: bool,
        cu_seqlens: Tensor | None,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> None:
        self._library.emulator_reset(ctypes.c_uint32(seed), ctypes.c_bool(truncate), resident)
        if cu_seqlens is not None:
            inputs = inputs | {"cu_seqlens": cu_seqlens}
        for writable, tensors in ((False, inputs), (True, outputs)):
            for name, tensor in tensors.items():
                self._library.emulator_buffer(
                    name.encode(),
                    ctypes.c_void_p(tensor.data_ptr()),
                    ctypes.c_size_t(span_bytes(tensor)),
                    ctypes.c_bool(writable),
                    ctypes.c_bool(False),
                )

    def _finish(self, run: Run) -> Run:
        run.log = self._library.emulator_log().decode()
        for i in range(self._library.emulator_launches()):
            run.launches.append(Counters.from_buffer_copy(self._library.emulator_counters(i).contents))
        return run


class _WithWorkspace(Kernels):
    def __init__(
        self, dtype: torch.dtype, head_dim: int, kernels: Path = KERNELS, options: tuple[str, ...] = OPTIONS
    ) -> None:
        super().__init__(dtype, head_dim, kernels, options)
        self._library.workspace_bytes.restype = ctypes.c_int64

    def _workspace(self, problem: _Problem) -> dict[str, Tensor]:
        words = self._library.workspace_bytes(ctypes.byref(problem)) // 4
        return {"workspace": torch.full((words,), -1, dtype=torch.int32)}


class ShortKernels(_WithWorkspace):
    """Those that take a head in one block; always deterministic."""

    _program = "short.cpp"


class WavefrontKernels(_WithWorkspace):
    """Those for causal attention in one launch; `lag` is the forward's."""

    _program = "wavefront.cpp"

    def __init__(
        self,
        dtype: torch.dtype,
        head_dim: int,
        lag: int,
        kernels: Path = KERNELS,
        options: tuple[str, ...] = OPTIONS,
    ) -> None:
        super().__init__(dtype, head_dim, kernels, options)
        self._forward = f"run_forward_lag{lag}"


@cache
def kernels(dtype: torch.dtype, head_dim: int) -> Kernels:
    return Kernels(dtype, head_dim)


@cache
def short(dtype: torch.dtype, head_dim: int) -> ShortKernels:
    return ShortKernels(dtype, head_dim)


@cache
def wavefront(dtype: torch.dtype, head_dim: int, lag: int) -> WavefrontKernels:
    return WavefrontKernels(dtype, head_dim, lag)


def span_bytes(tensor: Tensor) -> int:
    """From a tensor's first element to its last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def poison(like: Tensor) -> Tensor:
    """A contiguous tensor of NaN."""
    return torch.full(like.shape, math.nan, dtype=like.dtype)


def _problem(query: Tensor, key: Tensor, is_causal: bool, scale: float | None, cu_seqlens: Tensor | None) -> _Problem:
    batch, heads, seq, head_dim = query.shape
    offsets = (0, None) if cu_seqlens is None else (len(cu_seqlens) - 1, cu_seqlens.data_ptr())
    return _Problem(batch, heads, key.shape[1], seq, *offsets, head_dim**-0.5 if scale is None else scale, is_causal)
