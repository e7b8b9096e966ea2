"""The benchmarks of whole steps and of training around them: they run on two ranks, and their tables compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.loops import LOOPS
from benchmarks.step import PARTS, Candidate, table

REPOSITORY = Path(__file__).parents[1]


def test_table_gives_the_median_of_the_rounds_ratios():
    softmax = Candidate("softmax", None, seconds=[(0.1, 0.2, 0.1), (0.2, 0.4, 0.2), (0.1, 0.2, 0.1)])
    twicing = Candidate("twicing", None, seconds=[(0.1, 0.1, 0.1), (0.2, 0.3, 0.1), (0.1, 0.1, 0.1)])
    _, first, second = table([softmax, twicing])
    assert first.split() == ["softmax", "1.00", "400.0", "±100%", "100.0", "200.0", "100.0"]
    assert second.split() == ["twicing", "0.75", "300.0", "±100%", "100.0", "100.0", "100.0"]


def test_loops_are_compared_with_the_trainer_beside_them():
    seconds = dict(zip(LOOPS, ([0.2, 0.4], [0.2, 0.4], [0.1, 0.2], [0.3, 0.6]), strict=True))
    _, *lines = training.loop_table({1: seconds, 2: seconds}, units=1000, unit="tokens")
    assert [line.split()[-4:] for line in lines[:4]] == [
        ["1.00", "300.0", "±100%", "3,333"],
        ["1.00", "300.0", "±100%", "3,333"],
        ["0.50", "150.0", "±100%", "6,667"],
        ["1.50", "450.0", "±100%", "2,222"],
    ]
    assert [line[:9] for line in lines] == ["1 process"] * 4 + ["2 ranks  "] * 4
    (line,) = training.run_table({"launch to first step": [9.0, 8.0, 12.0]})
    assert line.split()[-7:] == ["9.00", "s", "(8.00", "to", "12.00", "of", "3)"]


@pytest.mark.long
def test_training_is_measured_from_its_launch_on(wikipedia, tmp_path, monkeypatch, capsys):
    smaller = ["model.layers=1", "model.width=32", "model.mlp_width=32", "data.workers=0"]
    arguments = ["configs/language/quickstart.yaml", *smaller, "--repeats=1", "--rounds=2"]
    monkeypatch.setattr(sys, "argv", ["training", *arguments, f"--json={tmp_path / 'a.json'}"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert training.main() == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert {name: len(turns) for name, turns in written["loops"]["2"].items()} == dict.fromkeys(LOOPS, 2)
    assert [len(seconds) for seconds in written["runs"].values()] == [1, 1, 3, 3]
    assert all(seconds > 0 for turns in written["runs"].values() for seconds in turns)
    assert "2 ranks    engine alone" in capsys.readouterr().out


@pytest.mark.long
def test_steps_are_measured_on_two_ranks(wikipedia, tmp_path):
    smaller = ["model.layers=1", "model.width=32", "model.mlp_width=32", "data.workers=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["benchmarks.step", "configs/language/quickstart.yaml", *smaller, "--rounds=2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def output(option: str) -> str:
        done = subprocess.run([*command, option], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "softmax: one SDPA          1.00" in output(f"--json={tmp_path / 'a.json'}")
    written = json.loads((tmp_path / "a.json").read_text())
    assert list(written) == ["softmax: one SDPA", "softmax, documents mixed", "twicing: auto", "twicing: composed"]
    assert all(len(steps) == 2 and set(steps[0]) == set(PARTS) for steps in written.values())
    assert "twicing::backward" in output("--profile")
