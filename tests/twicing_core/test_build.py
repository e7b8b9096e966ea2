"""Compiling the CPU kernels at first use: once for many processes, never half, and doing without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twicing_core import build

ATTEND = """
import torch, twicing_core
x = torch.randn(1, 2, 16, 8)
try:
    twicing_core.twicing_attention(x, x, x, backend="fused")
    print("fused")
except ValueError as error:
    print(error)
print(tuple(twicing_core.twicing_attention(x, x, x).shape))
"""


def start(cache: Path, **environment: str) -> subprocess.Popen[str]:
    names = os.environ | {"TWICING_CACHE": str(cache), "PYTHONPATH": str(Path(build.__file__).parents[1])} | environment
    return subprocess.Popen(
        [sys.executable, "-c", ATTEND], env=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output.splitlines(), errors


@pytest.fixture
def counting_compiler(tmp_path):
    """A compiler that notes each time it compiles, and otherwise is g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    compiler = tmp_path / "count_g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo "$@" >> {tmp_path}/compiled\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    return compiler


@pytest.mark.slow
def test_of_two_processes_one_compiles_and_both_run(tmp_path, counting_compiler):
    cache = tmp_path / "cache"
    both = [start(cache, CXX=str(counting_compiler)) for _ in range(2)]
    for process in both:
        assert finish(process) == (["fused", "(1, 2, 16, 8)"], "")
    assert len((tmp_path / "compiled").read_text().splitlines()) == 1
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]
    finish(start(cache, CXX=str(counting_compiler)))
    assert len((tmp_path / "compiled").read_text().splitlines()) == 1, "the cache was not used"


def assert_does_without(process, reason):
    (message, shape), errors = finish(process)
    assert message.startswith("backend 'fused' cannot do this call: ") and message.endswith("use composed or reference")
    assert reason in message and shape == "(1, 2, 16, 8)"
    return [line for line in errors.splitlines() if "twicing_core: no fused CPU kernels" in line]


def test_without_a_compiler_there_is_one_notice(tmp_path):
    notices = assert_does_without(start(tmp_path, CXX="no-such-compiler"), "no C++ compiler 'no-such-compiler' found")
    assert len(notices) == 1


def test_a_compiler_that_fails_is_quoted_and_leaves_no_library(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.h:1: error: too old" >&2\nexit 1\n')
    compiler.chmod(0o755)
    notices = assert_does_without(start(tmp_path / "cache", CXX=str(compiler)), "x.h:1: error: too old; all of it in")
    assert len(notices) == 1
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".log"]


def test_a_damaged_library_is_no_reason_to_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("TWICING_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda command, path: path.write_text("not a library"))
    build.library()
    notices = assert_does_without(start(tmp_path), "library")
    assert len(notices) == 1


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert_does_without(start(tmp_path / "file"), "the cache directory")


def test_can_be_switched_off(tmp_path):
    assert assert_does_without(start(tmp_path, TWICING_DISABLE_FUSED="1"), "TWICING_DISABLE_FUSED is set") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", ["source", "torch", "processor", "compiler", "flags"])
def test_the_name_depends_on(changed, tmp_path, monkeypatch):
    def fingerprint():
        return build._fingerprint([sys.executable, "-O3", *(["-O2"] if changed == "flags" and before else [])])

    before = ""
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    before = fingerprint() if changed != "flags" else build._fingerprint([sys.executable, "-O3"])
    assert build._fingerprint([sys.executable, "-O3"]) == before
    if changed == "source":
        (tmp_path / "csrc" / "simd.h").open("a").write("\n")
    elif changed == "torch":
        monkeypatch.setattr(build.torch, "__version__", "0")
    elif changed == "processor":
        monkeypatch.setattr(build, "_processor", lambda: "older")
    elif changed == "compiler":
        monkeypatch.setattr(build.subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, 0, "1"))
    assert fingerprint() != before


SANITIZED = """
import itertools, torch
from twicing_core import operator
torch.ops.load_library(LIBRARY)
torch.manual_seed(0)
for threads, dtype, is_causal in itertools.product((1, 4), (torch.float32, torch.bfloat16, torch.float16), (0, 1)):
    torch.set_num_threads(threads)
    for seq, head_dim, key_heads in ((1, 8, 2), (33, 20, 1), (197, 64, 2), (300, 16, 2), (600, 40, 1)):
        for cu_seqlens in (None, torch.tensor([0, seq // 3, seq // 3, seq], dtype=torch.int32)):
            q, g = torch.randn(2, 1, 2, seq, head_dim).to(dtype)
            q *= 20  # so that hidden scores are far above the largest that is seen
            k, v = torch.randn(2, 1, key_heads, seq, head_dim).to(dtype)
            saved = torch.ops.twicing.forward(q, k, v, cu_seqlens, bool(is_causal), 0.3, "")
            torch.ops.twicing.backward(g, q, k, v, *saved, cu_seqlens, bool(is_causal), 0.3, "", False)
print("clean")
"""


@pytest.mark.long
def test_no_sanitizer_complains(tmp_path):
    """Address and undefined behaviour, over every path: short and long, alone and shared, ragged, packed, grouped."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(map(os.path.isabs, runtime)):
        pytest.skip("needs g++ with libasan and libubsan")
    library = tmp_path / "sanitized.so"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment,vptr", *build._flags()[1:]]
    subprocess.run(["g++", str(build.SOURCES / "library.cpp"), *flags, "-o", str(library)], check=True, timeout=500)
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(Path(build.__file__).parents[1]),
    }
    script = SANITIZED.replace("LIBRARY", repr(str(library)))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.stdout == "clean\n" and "runtime error" not in done.stderr, done.stderr[-3000:]
