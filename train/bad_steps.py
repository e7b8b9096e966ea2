"""Steps that must not change the weights: a loss or gradient that is not finite, a loss far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from train.config import TrainConfig

WINDOW = 100  # steps that are remembered
ENOUGH = 20  # losses from which a mean and a deviation can be told


class BadSteps:
    """Remembers the last steps; the same on every rank, and after a resume the same as if there had been none."""

    def __init__(self, train: TrainConfig, recent: Iterable[tuple[float | None, str | None]]) -> None:
        """`recent` has the loss (None: not finite) and the reason for skipping of the last steps, oldest first."""
        self._train = train
        self._recent = deque(recent, maxlen=WINDOW)

    def problem(self, loss: float) -> str | None:
        """What is wrong with the loss of the step to come; None if the step can be taken."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        losses = [loss for loss, skipped in self._recent if loss is not None and not skipped]
        if self._train.on_loss_spike == "ignore" or len(losses) < ENOUGH:
            return None
        mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
        if loss <= mean + self._train.spike_z_score * deviation:
            return None
        return f"the loss {loss:.4f} is a spike: the last {len(losses)} had a mean of {mean:.4f} and a deviation of {deviation:.4f}"

    def note(self, loss: float, skipped: str | None) -> None:
        self._recent.append((loss, skipped))

    def too_many(self) -> str | None:
        """Why the run must stop; None while skipped steps are few."""
        skipped = [reason for _, reason in self._recent if reason]
        if len(skipped) <= self._train.max_skipped_steps:
            return None
        return f"{len(skipped)} of the last {len(self._recent)} steps were skipped, the last because {skipped[-1]}"
