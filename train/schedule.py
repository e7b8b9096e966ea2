"""The learning rate, a pure function of the step, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math

from train.config import AnyConfig


def learning_rate(step: int, config: AnyConfig) -> float:
    """The learning rate of `step`, which counts from 1 to `train.steps`.

    It rises linearly to `optimizer.lr` at step `schedule.warmup_steps` (and never gets there when the run is shorter),
    then falls to `schedule.final_lr_fraction` of it at the last step, or stays where `schedule.kind` is `constant`.
    """
    assert step >= 1, step
    schedule, peak = config.schedule, config.optimizer.lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    assert step <= config.train.steps, step
    progress = (step - schedule.warmup_steps) / (config.train.steps - schedule.warmup_steps)
    remaining = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * remaining)
