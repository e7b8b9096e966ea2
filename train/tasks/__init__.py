"""What differs between language and vision, and only that: a `Task` each. The training loop knows no more than this."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from train.config import AnyConfig, LanguageConfig, VisionConfig
from train.models.attention import SharedRows, backend_in_use
from train.models.flops import model_flops_per_sample
from train.precision import DTYPES, resolve_precision

Batch = dict[str, Tensor]


class Task(Protocol):
    """A kind of model with its loss and its measures. Sums, never means, so that ranks and batches add up exactly."""

    unit: str  # what throughput counts: "tokens" or "images"
    units_per_sample: int

    def build_model(self, initialise: bool = True) -> Any:
        """The model with fresh weights from torch's global generator.

        With `initialise=False` its method `initialise(writable)` must follow: `writable(parameter)` makes a parameter of a
        partitioned model whole while it is written. The weights are the same then.
        """

    def flops_per_unit(self) -> tuple[float, float]:
        """(model, hardware) FLOPs of forward and backward for one token or image."""

    def loss_sum(self, model: Any, batch: Batch, first_sample: int) -> Tensor:
        """Differentiable float32 scalar: the loss summed over the batch's targets, skipped samples weighing 0.

        Where ranks share rows, over this rank's own targets.
        `first_sample` is the number n of the data order at which the global batch starts; randomness may draw from it.
        """

    def validation_sums(self, model: Any, batch: Batch) -> Tensor:
        """float64 (k,): sums over the batch, or this rank's part of it, that `validation_metrics` turns into metrics."""

    def validation_metrics(self, sums: Tensor) -> dict[str, float]:
        """Metrics by name from the sums over all batches and ranks."""

    def example(self, model: Any, batch: Batch) -> tuple[str, str | Tensor] | None:
        """A title and what to show under it: text (Markdown), or an image (3, h, w) of floats in [0, 1]."""

    def placeholder_batch(self, samples: int) -> Batch:
        """A random batch of the right shape, for a dry run without the data."""


def targets(batch: Batch, units_per_sample: int) -> int:
    """Targets of a batch that count: tokens or images of the samples that were not skipped."""
    return int(batch["weights"].sum().item()) * units_per_sample


def flops_per_sample(config: AnyConfig, device: torch.device) -> tuple[float, float]:
    """(model, hardware) FLOPs of forward and backward for one text row or image on `device`."""
    dtype = DTYPES[resolve_precision(config.train.precision, device)]
    return model_flops_per_sample(config, backend_in_use(config.model, device, dtype), device)


def build_task(
    config: AnyConfig, tokenizer_path: Path | None, device: torch.device, shared_rows: SharedRows | None = None
) -> Task:
    """The task that `config.task` names.

    Args:
        tokenizer_path: the data set's; None where it is not at hand.
        shared_rows: where ranks share rows, this rank's part in them (language).
    """
    if isinstance(config, LanguageConfig):
        from train.tasks.language import LanguageTask

        return LanguageTask(config, tokenizer_path, device, shared_rows)
    assert isinstance(config, VisionConfig)
    from train.tasks.vision import VisionTask

    return VisionTask(config, device)
