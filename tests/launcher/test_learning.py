"""Learning, on real data, through the real launcher: what the quick starts promise, in a fraction of their time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def _report(run_dir: Path) -> dict[str, float]:
    """The first figure of each line of `python -m train.evaluate --baselines`."""
    command = [sys.executable, "-m", "train.evaluate", str(run_dir), "--baselines"]
    output = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    table = [line for line in output.splitlines()[2:] if line[:1].isalnum()]
    return {line[:42].strip(): float(line[42:].split()[0]) for line in table}


@pytest.mark.slow
def test_a_language_model_beats_the_bigram_model(launch, prepare, tmp_path):
    """A small vocabulary, so that a minute is enough to learn more than which token follows which."""
    data = prepare("wikipedia-512", "text", "--source=wikipedia-summaries", "--vocab-size=512", "--row-length=128")
    job = launch(
        "configs/language/quickstart.yaml",
        tmp_path / "run",
        f"data.train={data}/train",
        f"data.validation={data}/validation",
        "model.vocab_size=512",
        "model.sequence_length=128",
        "model.width=128",
        "model.heads=2",
        "model.mlp_width=344",
        "model.layers=2",
        "train.steps=1500",
        "optimizer.lr=3e-3",
        "evaluate.every_steps=0",
        "checkpoint.every_steps=1500",
    )
    assert job.wait(400) == 0, job.output
    losses = _report(tmp_path / "run")
    assert losses["this model"] < losses["bigram model (interpolated Kneser-Ney)"] < losses["unigram model"]


@pytest.mark.long
def test_a_vision_transformer_learns_to_tell_clothes_apart(launch, fashion_mnist, tmp_path):
    """A seventh of the quick start's steps: 75 % of the test images, where guessing gives 10 %."""
    job = launch(
        "configs/vision/quickstart.yaml",
        tmp_path / "run",
        "train.steps=400",
        "schedule.warmup_steps=60",
        "evaluate.every_steps=0",
        "checkpoint.every_steps=400",
    )
    assert job.wait(400) == 0, job.output
    accuracy = _report(tmp_path / "run")
    assert accuracy["this model"] >= 75.0
    if "Ankle boot" in (fashion_mnist / "classes.txt").read_text():  # else the quick start had to take MNIST
        assert accuracy["ResNet18 (published)"] == 94.9
