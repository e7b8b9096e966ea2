"""A plain wheel holds both packages and the sources of the kernels; making it says what became of the kernels."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_installs_and_runs_without_the_repository(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "-vv", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)]
    built = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "twicing_core: no kernels were compiled, for torch cannot be seen from here" in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {
        str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "twicing_core" / "csrc").rglob("*.*") if p.is_file()
    }
    assert {"train/__main__.py", "train/prepare/__main__.py", "twicing_core/attention.py"} | kernels <= names
    assert not any(name.startswith(("tests", "configs", "data", "runs")) for name in names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    script = (
        "import torch, twicing_core as t; print(t.__file__, t.twicing_attention(*torch.randn(3, 1, 2, 5, 8)).shape)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert str(site) in ran.stdout and "[1, 2, 5, 8]" in ran.stdout
