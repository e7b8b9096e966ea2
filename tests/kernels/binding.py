"""Builds the twin of the CUDA library: the same library.cpp, for CPU tensors, with kernels that the emulator runs."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from emulated import BUILD, COMPILE, EMULATOR, KERNELS, MACHINE

from twicing_core.build_cuda import TARGET_VERSION

ELEMENT_HEAD_DIMS = (("Bf16", 16), ("Fp16", 32))


def build_twin(kernels: Sequence[tuple[str, int]] = ELEMENT_HEAD_DIMS) -> Path:
    """Returns the library's path; it is kept until a source changes."""
    root = Path(torch.__file__).parent
    flags = [*COMPILE, "-O1", "-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{KERNELS}"]
    sources = [Path(__file__)]  # which says how
    sources += sorted(path for folder in (EMULATOR, KERNELS) for path in folder.iterdir() if path.suffix != ".md")
    digest = hashlib.sha256(repr((kernels, torch.__version__)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = BUILD / f"binding_{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    BUILD.mkdir(parents=True, exist_ok=True)
    torch_flags = [
        "-DTWICING_DISPATCH_KEY=CPU",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        "-isystem",
        root / "include",
    ]
    with TemporaryDirectory(dir=BUILD) as folder, ThreadPoolExecutor() as threads:
        commands = {f"{folder}/library.o": [*torch_flags, KERNELS / "library.cpp"]}
        commands |= {f"{folder}/{name}.o": [EMULATOR / name] for name in MACHINE}
        for element, head_dim in kernels:
            defines = [f"-DELEMENT={element}", f"-DHEAD_DIM={head_dim}"]
            commands[f"{folder}/{element}_{head_dim}.o"] = [*defines, EMULATOR / "binding.cpp"]

        def compile_object(target: str) -> None:
            subprocess.run([*flags, "-c", *commands[target], "-o", target], check=True)

        list(threads.map(compile_object, commands))
        link = [*COMPILE, *commands, f"-L{root / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs", "-o", f"{folder}/library.so"]
        subprocess.run(link, check=True)
        Path(folder, "library.so").rename(library)
    return library
