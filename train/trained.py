"""A trained run, opened to be used: its config, its model with the newest weights, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.config import AnyConfig, load_config
from train.data.loader import Data, build_data
from train.precision import DTYPES, resolve_precision
from train.run_directory import newest_checkpoint
from train.tasks import Task, build_task
from train.weights import load_weights

ALONE = ("train.micro_batch_size=null", "train.sequence_parallel_size=1")  # what has been for other ranks too


@dataclass
class Trained:
    config: AnyConfig
    task: Task
    model: nn.Module  # in evaluation mode, on `device`, in the precision it was trained in
    data: Data
    device: torch.device
    checkpoint: Path


def open_run(run_dir: str | Path, overrides: list[str] | None = None) -> Trained:
    """Loads a run for generation or evaluation, in this process alone.

    Raises:
        ValueError: not a run directory, no checkpoint in it, or its data set is gone.
    """
    config_file = Path(run_dir) / "config.yaml"
    if not config_file.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it holds no config.yaml")
    config = load_config(config_file, [*ALONE, *(overrides or [])])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = build_data(config, 0, 1)
    task = build_task(config, data.tokenizer_path, device)
    checkpoint = newest_checkpoint(run_dir)
    model = task.build_model()
    load_weights(model, checkpoint / "model.safetensors")
    model = model.to(device, DTYPES[resolve_precision(config.train.precision, device)]).eval()
    return Trained(config, task, model, data, device, checkpoint)


def print_errors(command: Any) -> int:
    """Runs a command's body; a user's mistake becomes one line and exit code 2."""
    import sys

    try:
        command()
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
