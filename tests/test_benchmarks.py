"""The benchmark of whole steps: it runs on two ranks, and its table compares with plain attention."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step import PARTS, Candidate, table

REPOSITORY = Path(__file__).parents[1]


def test_table_gives_the_median_of_the_rounds_ratios():
    softmax = Candidate("softmax", None, seconds=[(0.1, 0.2, 0.1), (0.2, 0.4, 0.2), (0.1, 0.2, 0.1)])
    twicing = Candidate("twicing", None, seconds=[(0.1, 0.1, 0.1), (0.2, 0.3, 0.1), (0.1, 0.1, 0.1)])
    _, first, second = table([softmax, twicing])
    assert first.split() == ["softmax", "1.00", "400.0", "±100%", "100.0", "200.0", "100.0"]
    assert second.split() == ["twicing", "0.75", "300.0", "±100%", "100.0", "100.0", "100.0"]


@pytest.mark.long
def test_steps_are_measured_on_two_ranks(wikipedia, tmp_path):
    smaller = ["model.layers=1", "model.width=32", "model.mlp_width=32", "data.workers=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["benchmarks.step", "configs/language/quickstart.yaml", *smaller, "--rounds=2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--json={tmp_path / 'a.json'}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "a.json").read_text())
    assert list(written) == ["softmax: one SDPA", "softmax, documents mixed", "twicing: auto", "twicing: composed"]
    assert all(len(steps) == 2 and set(steps[0]) == set(PARTS) for steps in written.values())
    assert "softmax: one SDPA          1.00" in done.stdout
