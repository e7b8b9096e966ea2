"""Steps that are skipped change nothing, are counted, and are the same steps after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from train.bad_steps import BadSteps
from train.config import TrainConfig, load_config
from train.distributed import Ranks
from train.engine import build_engine, full_state_dict, set_learning_rate, take_step

LANGUAGE = "configs/language/quickstart.yaml"
STEADY = [(3.0 + 0.1 * (-1) ** n, None) for n in range(30)]  # mean 3, deviation 0.1


def _train(**settings: object) -> TrainConfig:
    return TrainConfig(steps=1000, global_batch_size=8, **settings)


def test_a_loss_that_is_not_finite():
    steps = BadSteps(_train(), [])
    assert steps.problem(math.nan) == "the loss is nan" and steps.problem(math.inf) == "the loss is inf"
    assert steps.problem(1e30) is None  # spikes are ignored unless asked for


def test_a_spike_is_told_from_the_losses_before_it():
    steps = BadSteps(_train(on_loss_spike="skip", spike_z_score=5.0), STEADY)
    assert steps.problem(3.49) is None
    problem = steps.problem(3.51)
    assert problem == "the loss 3.5100 is a spike: the last 30 had a mean of 3.0000 and a deviation of 0.1000"
    steps.note(99.0, problem)
    assert steps.problem(3.51) is not None  # what was skipped is no measure of what is normal
    assert BadSteps(_train(on_loss_spike="skip"), STEADY[:19]).problem(99.0) is None  # too few to tell


def test_skipped_steps_are_limited_among_the_last_hundred():
    steps = BadSteps(_train(max_skipped_steps=2), [])
    for loss, skipped in [(None, "nan"), *STEADY, (None, "nan")]:
        steps.note(loss, skipped)
    assert steps.too_many() is None
    steps.note(math.nan, "the loss is nan")
    assert steps.too_many() == "3 of the last 33 steps were skipped, the last because the loss is nan"
    for loss, skipped in STEADY * 3:
        steps.note(loss, skipped)
    assert steps.too_many() is None


def _weights_after(
    ranks: Ranks, directory: Path, stage: int, precision: str, steps: list[str]
) -> dict[str, torch.Tensor]:
    file = directory / f"zero{stage}_{ranks.rank}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = load_config(LANGUAGE, ["train.global_batch_size=4", f"deepspeed.config={file}"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    engine = build_engine(model, config, ranks.world_size, precision)
    dtype = next(engine.module.parameters()).dtype
    for number, kind in enumerate(steps):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(ranks.rank))
        loss = (engine(x.to(dtype)).float() - 1).pow(2).mean()
        if kind == "nan" and ranks.rank == 1:  # one rank is enough
            loss = loss * math.nan
        engine.backward(loss, scale_wrt_gas=False)
        set_learning_rate(engine, 0.01)
        updated = take_step(engine, update=kind != "skip")
        assert updated == (kind == "good"), (stage, precision, number, kind)
    return full_state_dict(engine, is_main=True)


def _all_kinds(ranks: Ranks, directory: Path) -> None:
    for stage, precision in [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")]:
        expected = _weights_after(ranks, directory, stage, precision, ["good", "good"])
        weights = _weights_after(ranks, directory, stage, precision, ["skip", "nan", "good", "nan", "skip", "good"])
        for name in expected:
            assert torch.equal(weights[name], expected[name]), (stage, precision, name)


def test_a_skipped_step_changes_neither_weights_nor_optimizer(run_distributed, tmp_path):
    run_distributed(_all_kinds, 2, tmp_path)


@pytest.mark.slow
def test_spikes_are_rolled_back_the_same_after_a_resume(launch, wikipedia, tmp_path):
    """With a threshold so low that chance alone makes spikes, and a stop between a checkpoint and the spikes after it."""
    settings = ["model.layers=1", "model.width=32", "model.heads=2", "model.mlp_width=64", "train.global_batch_size=2"]
    settings += [
        "train.steps=60",
        "checkpoint.every_steps=8",
        "train.on_loss_spike=roll_back",
        "train.spike_z_score=0.6",
    ]
    settings += ["train.max_skipped_steps=100", "optimizer.lr=1e-4", "evaluate.every_steps=0"]
    whole = launch(LANGUAGE, tmp_path / "whole", *settings, launcher="python")
    assert whole.wait() == 0, whole.output
    skipped = [line["step"] for line in whole.metrics() if "skipped" in line]
    assert skipped and "rolled back to the weights of step" in whole.output

    stopped = launch(
        LANGUAGE, tmp_path / "stopped", *settings, f"train.stop_at_step={skipped[0] + 1}", launcher="python"
    )
    assert stopped.wait() == 0, stopped.output
    again = launch(LANGUAGE, tmp_path / "stopped", *settings, launcher="python")
    assert again.wait() == 0, again.output
    assert again.metrics() == whole.metrics()


@pytest.mark.slow
def test_a_run_that_diverges_stops(launch, wikipedia, tmp_path):
    settings = [
        "model.layers=1",
        "train.global_batch_size=2",
        "train.steps=40",
        "optimizer.lr=1e30",
        "optimizer.grad_clip=0",
    ]
    job = launch(
        LANGUAGE, tmp_path, *settings, "schedule.warmup_steps=0", "train.max_skipped_steps=3", launcher="local.sh"
    )
    assert job.wait() == 1, job.output
    assert "steps were skipped, the last because" in job.output
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["restart"], status["restarts"]) == ("failed", False, 0)
    assert job.output.count("supervisor: start") == 1  # it would only happen again
