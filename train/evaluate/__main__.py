"""`python -m train.evaluate RUN`: the validation metrics of a run's newest checkpoint, beside baselines."""

from __future__ import annotations

import argparse
import sys

import torch

from train.config import LanguageConfig
from train.evaluate.report import language_report, vision_report
from train.trained import Trained, open_run, print_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="Validation metrics of a run, beside baselines."
    )
    parser.add_argument("run", help="run directory, such as runs/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.validation=OTHER_DATA")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also fit n-gram models to the training tokens (needs memory for all of them)",
    )
    options = parser.parse_args()

    trained = open_run(options.run, options.overrides)
    metrics = validation_metrics(trained)
    report = language_report if isinstance(trained.config, LanguageConfig) else vision_report
    print(f"{trained.checkpoint}, {trained.config.data.validation}\n")
    print(report(trained, metrics, options.baselines))


@torch.no_grad()
def validation_metrics(trained: Trained) -> dict[str, float]:
    """Metrics over the whole validation set, every sample exactly once."""
    sums = None
    for batch in trained.data.validation_batches():
        batch = {name: value.to(trained.device) for name, value in batch.items()}
        batch_sums = trained.task.validation_sums(trained.model, batch)
        sums = batch_sums if sums is None else sums + batch_sums
    assert sums is not None
    return trained.task.validation_metrics(sums)


if __name__ == "__main__":
    sys.exit(print_errors(main))
