"""One run's directory: its lock, its status, and which checkpoint is the newest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from train.run_directory import RunDirectory, newest_checkpoint


def test_a_second_run_is_told_who_has_the_directory(tmp_path):
    first = RunDirectory(tmp_path)
    first.open()
    script = f"from train.run_directory import RunDirectory\nRunDirectory({str(tmp_path)!r}).open()"
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "is in use by process" in second.stderr and "give another run.dir" in second.stderr


def test_a_killed_run_leaves_no_lock(tmp_path):
    script = (
        "import os, signal\nfrom train.run_directory import RunDirectory\n"
        f"directory = RunDirectory({str(tmp_path)!r}); directory.open(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    RunDirectory(tmp_path).open()


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="run.dir=.*file/run can't be written"):
        RunDirectory(tmp_path / "file" / "run").open()


def test_status_is_replaced_whole(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_status("running")
    directory.write_status("stopped", step=3, reason="SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 3, "SIGTERM")


def test_newest_checkpoint_is_by_number(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "damaged_step_00000200").mkdir()
    assert newest_checkpoint(tmp_path).name == "step_00000100"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path / "elsewhere")
