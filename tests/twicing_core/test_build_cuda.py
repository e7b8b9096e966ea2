"""Compiling the CUDA kernels, and what happens without nvcc, without a GPU, or with the wrong one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twicing_core import build, build_cuda

REGISTERED = """
import sys, torch
from twicing_core import operator
names = ("twicing::forward", "twicing::backward")
registered = lambda: [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names]
before = registered()
torch.ops.load_library(sys.argv[1])
print(before, registered(), torch.cuda.is_available())
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWICING_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.mark.skipif(build_cuda.nvcc() is None, reason="needs nvcc")
def test_nvcc_builds_a_library_that_loads_without_a_gpu(own_cache):
    """The smallest: one element type, head dimension and architecture."""
    library = own_cache / "smallest.so"
    build_cuda.compile_library(library, ["8.0"], elements=["Bf16"], head_dims=[16])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(build.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED, str(library)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[False, False] [True, True] False\n", done.stderr
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].strip("]") for line in needed.splitlines() if "NEEDED" in line]
    assert not any("cuda" in name for name in needed), "it would not load where torch has no CUDA"


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A compiler that writes down how it is called, and makes an empty file of what it is asked for."""
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path / "called"


def test_an_object_for_each_kernel_and_one_library(fake_nvcc):
    path = build_cuda.build(["8.0", "12.0+PTX"])
    assert path.name.endswith("-8.0-12.0+PTX.so") and path.exists()
    calls = fake_nvcc.read_text().splitlines()
    assert len(calls) == len(build_cuda.ELEMENTS) * len(build_cuda.CUDA_HEAD_DIMS) + 2
    codes = "-gencode=arch=compute_80,code=[sm_80,sm_120,compute_80]"
    assert all(codes in call for call in calls[:-1]) and "-shared" in calls[-1]
    assert build_cuda.build(["8.0", "12.0+PTX"]) == path
    assert len(fake_nvcc.read_text().splitlines()) == len(calls), "the cache was not used"


def test_what_was_built_is_found_by_what_it_runs_on(fake_nvcc, monkeypatch):
    path = build_cuda.build(["8.0", "9.0"])
    monkeypatch.setenv("CUDA_HOME", "/nowhere")  # found on machines without a compiler
    assert build_cuda.find() == path
    assert build_cuda.library((8, 6)) == path == build_cuda.library((9, 0))
    assert build_cuda.find((12, 0)) is None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    with pytest.raises(build.BuildError, match="no nvcc found; install the CUDA toolkit, or set CUDA_HOME"):
        build_cuda.library((12, 0))


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        *[("8.0", (8, 0), True), ("8.0", (8, 9), True), ("8.9", (8, 6), False), ("8.0", (9, 0), False)],
        *[("9.0+PTX", (12, 0), True), ("9.0+PTX", (7, 5), False), ("12.0", (10, 0), False)],
    ],
)
def test_runs_on(architecture, capability, runs):
    assert build_cuda.runs_on(architecture, capability) == runs


def test_architectures(monkeypatch):
    assert build_cuda.architectures() == []  # no GPU in sight
    for listed, chosen in (("7.5;8.6", ["8.6"]), ("8.0 9.0+PTX", ["8.0", "9.0+PTX"])):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert build_cuda.architectures() == chosen
    for listed, message in (("Ampere", "'Ampere' is not like 8.0"), ("7.5", "has nothing that the kernels run on")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        with pytest.raises(build.BuildError, match=message):
            build_cuda.architectures()


def test_visible_gpus_are_compiled_for(monkeypatch):
    capabilities = [(9, 0), (7, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert build_cuda.architectures() == ["8.6", "9.0"]


def test_compiles_only_if_there_are_nvcc_and_a_gpu_or_it_is_told_to(fake_nvcc, monkeypatch):
    assert "there is no GPU here that can run them: set TORCH_CUDA_ARCH_LIST" in build_cuda.build_if_wanted()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert "CUDA kernels in " in build_cuda.build_if_wanted()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert "there is no nvcc" in build_cuda.build_if_wanted()


class Unavailable:
    """`build_cuda.unavailable` for a device of some compute capability."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def __call__(self, capability):
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        build_cuda.unavailable.cache_clear()
        return build_cuda.unavailable(0)


def test_old_devices_are_refused_without_a_notice(monkeypatch, recwarn):
    reason = Unavailable(monkeypatch)((7, 5))
    assert reason == "the CUDA kernels take devices of compute capability 8.0 and newer, this one has 7.5"
    assert not recwarn.list


def test_a_failed_build_is_one_notice_and_a_reason(monkeypatch, fake_nvcc):
    unavailable = Unavailable(monkeypatch)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.warns(UserWarning, match="no fused CUDA kernels .*; using torch's attention instead"):
        assert unavailable((9, 0)) == "TORCH_CUDA_ARCH_LIST has nothing that runs on capability 9.0"
    (fake_nvcc.parent / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\necho 'x.cuh(1): error: no' >&2\nexit 1\n")
    with pytest.warns(UserWarning, match="no fused CUDA kernels"):
        assert "nvcc failed: x.cuh(1): error: no; all of it in" in unavailable((8, 0))


def test_can_be_switched_off(monkeypatch):
    unavailable = Unavailable(monkeypatch)
    monkeypatch.setenv("TWICING_DISABLE_FUSED", "1")
    assert unavailable((9, 0)) == "TWICING_DISABLE_FUSED is set"
