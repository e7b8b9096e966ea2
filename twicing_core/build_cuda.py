"""Compiles the CUDA kernels with nvcc, at their first use or by `python -m twicing_core.build`.

One object for each element type and head dimension, as many at a time as there are processors, linked with the
registration of the operators. nvcc translates each to PTX once, for the oldest architecture, whose instructions are all
that the kernels use, and ptxas that to the code of every architecture: so what is verified of the PTX is true of all.

The registration speaks to torch by libtorch's stable ABI, so the library's name in the cache tells only the sources and
the architectures: it serves any torch from 2.13 on, is found on machines without nvcc (build it where there is one, and
share or copy ``$TWICING_CACHE``), and is loaded where there is no GPU at all.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import torch

from twicing_core.build import BuildError, cache_directory, disabled, make_once, run_compiler
from twicing_core.fused import CUDA_HEAD_DIMS

SOURCES = Path(__file__).parent / "csrc" / "cuda"
ELEMENTS = ("Bf16", "Fp16")
LEAST_CAPABILITY = (8, 0)  # mma of bfloat16, cp.async
VIRTUAL_ARCHITECTURE = "compute_80"  # that of the PTX
FLAGS = ["-std=c++20", "-O3"]
TARGET_VERSION = "0x020d000000000000"  # torch 2.13, the first that hands out a stream's native handle


@cache
def unavailable(device_index: int) -> str | None:
    """Loads the kernels, compiling them if need be. Returns why there are none for a device, or None once loaded.

    The first call of a process may take minutes. What failed is tried again by the next process only.
    """
    if disabled():
        return "TWICING_DISABLE_FUSED is set"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < LEAST_CAPABILITY:
        return f"the CUDA kernels take devices of compute capability 8.0 and newer, this one has {_dotted(capability)}"
    try:
        torch.ops.load_library(library(capability))
    except (BuildError, OSError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"twicing_core: no fused CUDA kernels ({reason}); using torch's attention instead", stacklevel=2)
        return reason
    return None


def library(capability: tuple[int, int]) -> Path:
    """Returns the path of a library that runs on devices of a compute capability, compiling it unless the cache has it.

    Raises:
        BuildError: there is no nvcc, it failed, ``TORCH_CUDA_ARCH_LIST`` leaves the device out, or the cache directory
            is not writable.
    """
    found = find(capability)
    if found is None:
        wanted = architectures()
        if not any(runs_on(architecture, capability) for architecture in wanted):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST has nothing that runs on capability {_dotted(capability)}")
        found = build(wanted)
    return found


def find(capability: tuple[int, int] | None = None) -> Path | None:
    """Returns a library of the cache that runs on devices of this capability (None: of any), if there is one."""
    for path in sorted(cache_directory().glob(f"cuda-{_fingerprint()}-*.so")):
        built = path.stem.split("-")[2:]
        if capability is None or any(runs_on(architecture, capability) for architecture in built):
            return path
    return None


def build(architectures: Sequence[str]) -> Path:
    """Compiles a library for these architectures into the cache, unless it is there, and returns its path.

    Raises:
        BuildError: there is no nvcc, it failed, or the cache directory is not writable.
    """
    path = cache_directory() / f"cuda-{_fingerprint()}-{'-'.join(architectures)}.so"

    def make() -> None:
        print(f"twicing_core: compiling CUDA kernels for {', '.join(architectures)}, once", file=sys.stderr, flush=True)
        compile_library(path, architectures)

    make_once(path, make)
    return path


def compile_library(
    path: Path,
    architectures: Sequence[str],
    elements: Sequence[str] = ELEMENTS,
    head_dims: Sequence[int] = CUDA_HEAD_DIMS,
) -> None:
    """Compiles a library to `path`: aside, and renamed, so that nobody ever sees half of it.

    Args:
        path: where; the compiler's complaints go beside it, to a file that ends in .log.
        architectures: such as "8.0", or "9.0+PTX" to keep the PTX too, which a driver can compile for its device.
        elements, head_dims: of the kernels to put in.

    Raises:
        BuildError: there is no nvcc, or it failed.
    """
    compiler = nvcc()
    if compiler is None:
        raise BuildError("no nvcc found; install the CUDA toolkit, or set CUDA_HOME")
    torch_root, aside = Path(torch.__file__).parent, path.with_suffix(f".{os.getpid()}")
    codes = [f"sm_{_number(architecture)}" for architecture in architectures]
    if any(architecture.endswith("+PTX") for architecture in architectures):
        codes.append(VIRTUAL_ARCHITECTURE)
    gencode = f"-gencode=arch={VIRTUAL_ARCHITECTURE},code=[{','.join(codes)}]"

    with tempfile.TemporaryDirectory(prefix="twicing_core_") as folder:

        def compile_object(name: str, source: str, *flags: str) -> str:
            target = f"{folder}/{name}.o"
            command = [compiler, *FLAGS, "-Xcompiler", "-fPIC", gencode, *flags]
            command += ["-x", "cu", "-c", str(SOURCES / source), "-o", target]
            run_compiler(command, log=path.with_suffix(".log"))
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as threads:
            flags = [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", f"-I{torch_root / 'include'}"]
            objects = [threads.submit(compile_object, "library", "library.cpp", *flags)]
            # Most kernels have those head dimensions that the short ones take, up to 64.
            longest_first = sorted(head_dims, key=lambda head_dim: (head_dim > 64, -head_dim))
            for head_dim, element in product(longest_first, elements):
                flags = [f"-DELEMENT={element}", f"-DHEAD_DIM={head_dim}"]
                objects.append(threads.submit(compile_object, f"{element}_{head_dim}", "kernels.cu", *flags))
        link = [compiler, "-shared", "-cudart", "static", "-Xlinker", "-z,defs", "-o", str(aside)]
        link += [made.result() for made in objects] + [f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        run_compiler(link, log=path.with_suffix(".log"))
    os.replace(aside, path)


def build_if_wanted() -> str:
    """Compiles if there is nvcc and either a GPU is visible or ``TORCH_CUDA_ARCH_LIST`` is set; says what was done."""
    start = time.monotonic()
    if nvcc() is None:
        return "no CUDA kernels, for there is no nvcc: install the CUDA toolkit if this machine has NVIDIA GPUs"
    try:
        wanted = architectures()
        if not wanted:
            return (
                "no CUDA kernels, for there is no GPU here that can run them: set TORCH_CUDA_ARCH_LIST (such as 9.0) "
                "to compile them anyway"
            )
        return f"CUDA kernels in {build(wanted)} ({time.monotonic() - start:.0f} s)"
    except BuildError as error:
        return f"no CUDA kernels ({error}); torch's attention will be used instead"


def nvcc() -> str | None:
    """The compiler of ``$CUDA_HOME``, or else the one on PATH or in /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def architectures() -> list[str]:
    """What to compile for: ``TORCH_CUDA_ARCH_LIST``, or else the visible GPUs.

    Raises:
        BuildError: ``TORCH_CUDA_ARCH_LIST`` is not understood, or all of it is older than 8.0.
    """
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        chosen = [word for word in re.split(r"[;,\s]+", listed) if word]
        for word in chosen:
            if not re.fullmatch(r"\d+\.\d(\+PTX)?", word):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: {word!r} is not like 8.0 or 9.0+PTX")
        chosen = [word for word in chosen if _capability(word) >= LEAST_CAPABILITY]
        if not chosen:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed} has nothing that the kernels run on: 8.0 and newer")
        return chosen
    if not torch.cuda.is_available():
        return []
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [_dotted(capability) for capability in sorted(capabilities) if capability >= LEAST_CAPABILITY]


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code runs on a device: the same major version and not a newer minor one, or PTX."""
    if architecture.endswith("+PTX"):
        return capability >= LEAST_CAPABILITY
    major, minor = _capability(architecture)
    return major == capability[0] and minor <= capability[1]


def _capability(architecture: str) -> tuple[int, int]:
    major, minor = architecture.removesuffix("+PTX").split(".")
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _fingerprint() -> str:
    parts = [platform.machine(), TARGET_VERSION, VIRTUAL_ARCHITECTURE, *FLAGS]
    parts += [source.name + source.read_text() for source in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _number(architecture: str) -> str:
    return "".join(map(str, _capability(architecture)))
