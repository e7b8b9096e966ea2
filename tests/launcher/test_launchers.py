"""Both quick starts through real launchers: stopped at any point they continue bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LANGUAGE = "configs/language/quickstart.yaml"
VISION = "configs/vision/quickstart.yaml"
STEPS = 60  # of a few hundredths of a second, so that signals arrive before the last
SHORT = [
    f"train.steps={STEPS}",
    "model.layers=2",
    "model.width=64",
    "model.heads=2",
    "data.workers=1",
    "checkpoint.every_steps=20",
    "evaluate.every_steps=0",
    "evaluate.prompts=[]",
    "monitor.every_steps=1",
    "schedule.warmup_steps=2",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, wikipedia, fashion_mnist):
    """`metrics.jsonl` of a run without a stop, for each config; made once."""
    made: dict[str, list[dict]] = {}

    def run(config: str, launch) -> list[dict]:
        if config not in made:
            job = launch(config, tmp_path_factory.mktemp("uninterrupted"), *SHORT)
            assert job.wait() == 0, job.output
            made[config] = job.metrics()
        return made[config]

    return run


@pytest.mark.parametrize(
    "config", [pytest.param(LANGUAGE, id="language"), pytest.param(VISION, id="vision", marks=pytest.mark.long)]
)
def test_stop_at_step_continues_bit_equal(launch, uninterrupted, tmp_path, config):
    expected = uninterrupted(config, launch)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert len({line["batch_hash"] for line in expected}) == STEPS

    first = launch(config, tmp_path, *SHORT, "train.stop_at_step=25")
    assert first.wait() == 0, first.output
    assert first.metrics() == expected[:25]
    assert f"reached step 25 of {STEPS}" in first.output
    again = launch(config, tmp_path, *SHORT)
    assert again.wait() == 0, again.output
    assert again.metrics() == expected


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_the_launch_script_saves_and_continues_bit_equal(launch, uninterrupted, tmp_path, signal_name):
    expected = uninterrupted(LANGUAGE, launch)
    in_background = str(signal_name == "SIGTERM").lower()
    job = launch(LANGUAGE, tmp_path, *SHORT, f"checkpoint.in_background={in_background}", launcher="local.sh")
    job.wait_for_step(2)
    job.process.send_signal(signal.Signals[signal_name])
    assert job.wait() == 75, job.output
    assert f"stopped by {signal_name}" in job.output and "Traceback" not in job.output
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", signal_name)
    done = len(job.metrics())
    assert 2 <= done < STEPS and job.metrics() == expected[:done]
    assert job.ranks() == []
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{done:08d}"
    if signal_name != "SIGTERM":
        return  # continuing is the same for all of them

    again = launch(LANGUAGE, tmp_path, *SHORT, launcher="local.sh")
    assert again.wait() == 0, again.output
    assert f"continuing after step {done}" in again.output
    assert again.metrics() == expected


def test_ctrl_c_on_the_deepspeed_command(launch, uninterrupted, tmp_path):
    """A terminal sends SIGINT to the whole process group: launcher, ranks and data workers at once."""
    expected = uninterrupted(LANGUAGE, launch)
    job = launch(LANGUAGE, tmp_path, *SHORT)
    job.wait_for_step(2)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.wait() != 0
    done = len(job.metrics())
    assert 2 <= done < STEPS
    again = launch(LANGUAGE, tmp_path, *SHORT)
    assert again.wait() == 0, again.output
    assert f"continuing after step {done}" in again.output
    assert again.metrics() == expected


def test_a_killed_rank_ends_the_job_and_costs_only_the_steps_since_the_checkpoint(launch, uninterrupted, tmp_path):
    expected = uninterrupted(LANGUAGE, launch)
    job = launch(LANGUAGE, tmp_path, *SHORT)
    job.wait_for_step(25)
    os.kill(max(job.ranks()), signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert job.ranks() == []
    again = launch(LANGUAGE, tmp_path, *SHORT)
    assert again.wait() == 0, again.output
    assert "continuing after step 20" in again.output or "continuing after step 40" in again.output
    assert again.metrics() == expected
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, STEPS + 1))  # none twice


@pytest.mark.long
def test_a_run_continues_on_any_number_of_ranks_and_at_any_stage(launch, uninterrupted, tmp_path):
    """2, 1, 4 and 2 ranks at stages 2, 3, 1 and 2: one run, with the same global batches as on two ranks throughout."""
    expected = uninterrupted(LANGUAGE, launch)
    for ranks, stage, steps in [(2, 2, 2), (1, 3, 4), (4, 1, 6), (2, 2, 8)]:
        settings = [f"deepspeed.config=configs/deepspeed/zero{stage}.json", f"train.stop_at_step={steps}"]
        job = launch(LANGUAGE, tmp_path, *SHORT, *settings, launcher="torchrun", ranks=ranks)
        assert job.wait() == 0, job.output
        assert f"ZeRO-{stage}" in job.output and (steps == 2 or f"and are now {ranks}" in job.output)
    _assert_close(job.metrics(), expected[:8])


def test_torchrun_trains_the_same_run(launch, uninterrupted, tmp_path):
    expected = uninterrupted(LANGUAGE, launch)
    job = launch(LANGUAGE, tmp_path, *SHORT, launcher="torchrun")
    assert job.wait() == 0, job.output
    assert job.metrics() == expected


def test_one_process_without_a_launcher_sees_the_same_global_batches(launch, uninterrupted, tmp_path):
    expected = uninterrupted(LANGUAGE, launch)
    job = launch(LANGUAGE, tmp_path, *SHORT, launcher="python")
    assert job.wait() == 0, job.output
    _assert_close(job.metrics(), expected)

    finished = launch(LANGUAGE, tmp_path, *SHORT, launcher="python")
    assert finished.wait() == 0
    assert "is trained already" in finished.output and finished.metrics() == job.metrics()
    _use_the_result(tmp_path)
    _start_from_its_weights(launch, tmp_path)


def _assert_close(lines: list[dict], expected: list[dict]) -> None:
    """The same batches; losses that agree for a while, as sums, perhaps of bf16, are taken in another order."""
    assert [line["batch_hash"] for line in lines] == [line["batch_hash"] for line in expected]
    for line, other in zip(lines[:8], expected[:8], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-3)


def _use_the_result(run_dir: Path) -> None:
    def command(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout

    report = command("train.evaluate", str(run_dir), "--baselines")
    assert all(word in report for word in ("this model", "bigram", "unigram", "perplexity"))
    loss = float(report.split("this model")[1].split()[0])
    recorded = json.loads((run_dir / "validation.jsonl").read_text().splitlines()[-1])
    assert loss == pytest.approx(recorded["loss"], abs=2e-3)
    text = command("train.generate", str(run_dir), "--prompt", "The history of", "--max-new-tokens", "5")
    assert text.startswith("The history of") and len(text) > len("The history of\n\n")


def _start_from_its_weights(launch, run_dir: Path) -> None:
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    job = launch(
        LANGUAGE, run_dir / "next", *SHORT, f"model.init_from={run_dir}", "train.stop_at_step=1", launcher="python"
    )
    assert job.wait() == 0, job.output
    assert abs(job.metrics()[0]["loss"] - last) < 0.2  # not the 8.3 of fresh weights
