"""The fused kernels where a processor lacks instructions of this one, which oneDNN's and torch's own switches play."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from twicing_core import build

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(build.unavailable() is not None, reason=f"no fused kernels: {build.unavailable()}"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86"),
]
REPOSITORY = Path(__file__).parents[2]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_kernels_are_right(**environment):
    """By the very tests of `test_fused.py`: alone and shared, in one pass and in two, of all dtypes; padded."""
    some = "test_error_is_within_the_rule and (197-threads1 or 513-threads2) or reaches_the_next and 97-24"
    done = python("pytest", "tests/twicing_core/test_fused.py", "-q", "-k", some, **environment)
    assert done.returncode == 0 and "30 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_without_tiles():
    """No AMX: products of bfloat16 are made in float32, and the doctor says so."""
    assert_kernels_are_right(ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    said = python("twicing_core", "doctor", ONEDNN_MAX_CPU_ISA="AVX512_CORE").stdout
    assert "of bfloat16 in float32 (no AMX)" in said


def test_without_avx512(tmp_path):
    """Half the vector width, so the library is another one."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/bash\nexec g++ "${@/-march=native/-march=x86-64-v3}"\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "TWICING_CACHE": str(tmp_path / "cache")}
    assert_kernels_are_right(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", **environment)
    assert list((tmp_path / "cache").glob("*.so")), "another library was used"


def test_without_brgemm():
    """oneDNN older than its small products, or another vendor's processor: a plain GEMM."""
    assert_kernels_are_right(ONEDNN_MAX_CPU_ISA="SSE41")
