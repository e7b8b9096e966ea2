"""Compiles the CPU kernels, at their first use or by `python -m twicing_core.build` (those for CUDA: `build_cuda`).

The library goes to a cache directory, ``$TWICING_CACHE`` or ``~/.cache/twicing``, under a name made of everything that
it depends on. So a home directory shared by different machines, or by several versions of torch, is no trouble: code
for a newer processor is never loaded by an older one. Of many processes that start at once, one compiles.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc" / "cpu"


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message is one line and says why."""


@cache
def unavailable() -> str | None:
    """Loads the kernels, compiling them if need be. Returns why there are none, or None once they are loaded.

    The first call of a process may take a minute. What failed is tried again by the next process only.
    """
    if disabled():
        return "TWICING_DISABLE_FUSED is set"
    try:
        torch.ops.load_library(library())
    except (BuildError, OSError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"twicing_core: no fused CPU kernels ({reason}); using torch's attention instead", stacklevel=2)
        return reason
    return None


def library() -> Path:
    """Returns the path of the compiled library, compiling it unless the cache has it.

    Raises:
        BuildError: there is no compiler, it failed, or the cache directory is not writable.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError(f"no C++ compiler {os.environ.get('CXX', 'g++')!r} found; install g++ or set CXX")
    command = [compiler, *_flags()]
    path = cache_directory() / f"cpu-{_fingerprint(command)}.so"
    make_once(path, lambda: _compile(command, path))
    return path


def disabled() -> bool:
    """Whether the user wants no compiled kernels."""
    return os.environ.get("TWICING_DISABLE_FUSED", "0") not in ("", "0")


def cache_directory() -> Path:
    """Where compiled libraries are kept, and what was measured of this machine's devices."""
    chosen = os.environ.get("TWICING_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "twicing"


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Calls `make`, which must leave a file at `path`, unless it is there; of many processes, one does.

    Raises:
        BuildError: the cache directory is not writable, or what `make` raises.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed when the file is closed, also by the end of the process
            if not path.exists():
                make()
    except OSError as error:
        raise BuildError(f"the cache directory {path.parent} cannot be used: {error.strerror}") from error


def run_compiler(command: list[str], log: Path) -> None:
    """Runs a compiler; if it fails, all it said goes to `log`.

    Raises:
        BuildError: it failed; the message quotes its first error.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr or done.stdout
        log.write_text(" ".join(command) + "\n" + said)
        first_error = next((line for line in said.splitlines() if "error" in line), said.strip()[:200])
        raise BuildError(f"{command[0]} failed: {first_error}; all of it in {log}")


def _flags() -> list[str]:
    root = Path(torch.__file__).parent
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-shared", "-w"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    flags += [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    return [*flags, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def _fingerprint(command: list[str]) -> str:
    """Of all that the library depends on: sources, command, compiler, torch and the processor's instructions."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*command, version, torch.__version__, _processor()]
    parts += [source.name + source.read_text() for source in sorted(SOURCES.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(command: list[str], path: Path) -> None:
    """Compiles aside and renames, so that nobody ever sees half a library."""
    aside = path.with_suffix(f".{os.getpid()}")
    run_compiler(
        [command[0], str(SOURCES / "library.cpp"), *command[1:], "-o", str(aside)], log=path.with_suffix(".log")
    )
    os.replace(aside, path)


def main() -> int:
    """Compiles what this machine has compilers and devices for, and says how it went.

    Not an error without, since everything runs without, slower.
    """
    from twicing_core import build_cuda

    started = time.monotonic()
    try:
        path = library()
        print(f"twicing_core: CPU kernels in {path} ({time.monotonic() - started:.0f} s)")
    except BuildError as error:
        print(f"twicing_core: no fused CPU kernels ({error}); torch's attention will be used instead")
    print(f"twicing_core: {build_cuda.build_if_wanted()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
