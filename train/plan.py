"""`--dry-run`: what a run would be, and one batch through its model in this process, without training anything."""

from __future__ import annotations

import os
import time
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from train.config import AnyConfig, VisionConfig, to_yaml
from train.data.loader import build_data
from train.data.order import check_world_size, micro_batch_size
from train.engine import gradient_accumulation_steps, zero_settings
from train.estimate.memory import state_memory, zero_config
from train.precision import DTYPES, resolve_precision
from train.run_directory import EXIT_FINISHED
from train.tasks import Batch, Task, build_task, targets


def dry_run(config: AnyConfig) -> int:
    """Prints the resolved config and the plan for `train.planned_world_size` ranks (or the launcher's, if it has more).

    The batch is the first real one where the data set is here, random otherwise. Raises ValueError as training would.
    """
    world_size = max(config.train.planned_world_size, int(os.environ.get("WORLD_SIZE", 1)))
    check_world_size(config, world_size)
    if os.environ.get("RANK", "0") != "0":
        return EXIT_FINISHED
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.train.precision, device)
    trial = _trial_config(config, world_size, device)
    data, absence = _data_if_there(trial)
    task = build_task(config, data.tokenizer_path if data else None, device)
    torch.manual_seed(config.train.seed)
    model = task.build_model()

    print(to_yaml(config))
    print(_plan(config, task, model, world_size, precision), flush=True)
    samples, shared = micro_batch_size(trial, 1), config.train.sequence_parallel_size
    if data:
        batch, source = next(data.train_batches(first_n=0)), f"the first {samples} samples of {config.data.train}"
    else:
        batch, source = task.placeholder_batch(samples), f"{samples} random samples, as {absence}"
    if shared > 1:
        batch, source = _slice(batch, shared), f"a rank's slice, one of {shared}, of {source}"
    tried = precision
    if precision == "bf16" and resolve_precision("auto", device) == "fp32":
        tried, source = "fp32", f"{source}, in fp32, as this processor only imitates bf16"
    print(f"one batch: {source}", flush=True)
    print(_try_batch(task, model.to(device, DTYPES[tried]), batch, device), flush=True)
    return EXIT_FINISHED


def _trial_config(config: AnyConfig, world_size: int, device: torch.device) -> AnyConfig:
    """For one process: a rank's micro-batch on a GPU, to meet its memory's limit now, and as little as can be on a CPU."""
    least = 2 if isinstance(config, VisionConfig) else 1  # mixup takes pairs
    samples = micro_batch_size(config, world_size) if device.type == "cuda" else least
    trial = deepcopy(config)
    trial.train.micro_batch_size = trial.train.global_batch_size = samples
    trial.train.sequence_parallel_size = 1
    trial.data.workers = 0
    return trial


def _slice(batch: Batch, shared: int) -> Batch:
    """The first of `shared` slices of the rows, as rows of their own.

    What a rank of a sequence group computes, but for attention: that is over whole rows, for so many heads fewer, which takes
    the same memory.
    """
    rows, length = batch["input_ids"].shape
    length //= shared
    return batch | {
        "input_ids": batch["input_ids"][:, :length],
        "targets": batch["targets"][:, :length],
        "cu_seqlens": torch.arange(0, rows * length + 1, length, dtype=torch.int32),
    }


def _data_if_there(config: AnyConfig) -> tuple[Any, str]:
    """The data set, or None and why not. A folder that exists but is unusable is an error, as in training."""
    if "://" not in config.data.train and not os.path.exists(config.data.train):
        return None, f"data.train={config.data.train} is not there"
    return build_data(config, 0, 1), ""


def _plan(config: AnyConfig, task: Task, model: nn.Module, world_size: int, precision: str) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    step_units = config.train.global_batch_size * task.units_per_sample
    model_flops, hardware_flops = task.flops_per_unit()
    settings = zero_settings(config)
    own_stage = zero_config(settings).stage
    lines = [
        f"ranks                     {world_size}",
        f"precision                 {precision}",
        f"parameters                {parameters:,}",
        f"{task.unit} a step".ljust(26) + f"{step_units:,}",
        f"{task.unit} in all".ljust(26) + f"{step_units * config.train.steps:,}",
        f"ranks that share a row    {config.train.sequence_parallel_size}",
        f"samples a forward pass    {micro_batch_size(config, world_size)}",
        f"gradient accumulation     {gradient_accumulation_steps(config, world_size)}",
        f"FLOPs a step, model       {model_flops * step_units:.3e}",
        f"FLOPs a step, hardware    {hardware_flops * step_units:.3e}",
        "memory a rank for weights, gradients and optimizer (`python -m train.estimate` has all of it):",
    ]
    for stage in range(4):
        memory = state_memory(zero_config(settings, stage), parameters, world_size, precision)
        gib = (memory.weights + memory.gradients + memory.optimizer) / 2**30
        lines.append(f"  ZeRO-{stage}  {gib:8.2f} GiB{'  <- this config' if stage == own_stage else ''}")
    return "\n".join(lines)


def _try_batch(task: Task, model: nn.Module, batch: Batch, device: torch.device) -> str:
    batch = {name: value.to(device) for name, value in batch.items()}
    start = time.perf_counter()
    units = batch["targets"].shape[1] if "targets" in batch else task.units_per_sample
    loss = task.loss_sum(model, batch, first_sample=0) / max(1, targets(batch, units))
    loss.backward()
    value = loss.item()
    return (
        f"loss {value:.4f}, forward and backward {time.perf_counter() - start:.2f} s on {device.type}: the config works"
    )
