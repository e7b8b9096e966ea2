"""A rank that is stopped is noticed by the others, which say where they wait; the run goes on."""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest

pytestmark = pytest.mark.long

LANGUAGE = "configs/language/quickstart.yaml"
SMALL = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.mlp_width=64",
    "train.global_batch_size=4",
    "schedule.warmup_steps=2",
    "train.steps=60",
    "checkpoint.every_steps=5",
    "evaluate.every_steps=0",
    "train.hang_seconds=3",
]


def test_a_stopped_rank(launch, wikipedia, tmp_path):
    job = launch(LANGUAGE, tmp_path, *SMALL, launcher="local.sh")
    job.wait_for_step(6)
    main = json.loads((tmp_path / "status.json").read_text())["pid"]
    (other,) = [pid for pid in job.ranks() if psutil.Process(pid).environ().get("RANK") == "1"]
    os.kill(other, signal.SIGSTOP)
    assert job.wait() == 0, job.output
    assert [line["step"] for line in job.metrics()] == list(range(1, 61))
    assert json.loads((tmp_path / "status.json").read_text())["restarts"] == 1
    assert not psutil.pid_exists(other) and not psutil.pid_exists(main)

    log = (tmp_path / "log.txt").read_text()
    (stacks,) = tmp_path.glob("stacks_*")
    assert f"hung: no progress for 3 s; the stacks of its ranks are in {stacks}" in log
    waiting = (stacks / "rank_00000.txt").read_text()
    assert waiting.startswith("Timeout (0:00:03)!") and "train/loop.py" in waiting
    assert (stacks / "rank_00001.txt").read_text() == ""  # a stopped process can't say anything
