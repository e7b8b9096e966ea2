"""`python -m train.simulate CONFIG [key=value ...] --world-size 1024`: a job of many ranks, on one machine without them.

What is real: the config's checks for that number of ranks; the model's shapes; DeepSpeed's own partitioning of every
parameter (`deepspeed.zero.Init`, on torch's fake process group, as ranks of a job of that size would run it); the data
order, asked for every rank's samples of a whole epoch.
What is not: nothing is sent, no weight has a value, no step is taken. Neither speed nor the network is tried.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed would look for one and say that it found none

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import AnyConfig, load_config
from train.data.manifest import Manifest
from train.data.order import DataOrder, check_world_size, data_parallel_size, micro_batch_size, rank_numbers
from train.data.storage import is_remote
from train.engine import deepspeed_config, gradient_accumulation_steps, zero_settings
from train.estimate.activations import meta_model
from train.estimate.fake_ranks import fake_process_group
from train.estimate.memory import state_memory, zero_config
from train.precision import DTYPES
from train.tasks import build_task
from train.trained import print_errors

SHARD_SAMPLES = 8192  # of an assumed data set


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    config, world_size = load_config(options.config, options.overrides), options.world_size
    check_world_size(config, world_size)
    if config.train.precision == "auto":
        config.train.precision = "bf16"
    print(simulate_model(config, world_size), flush=True)
    print(simulate_data(config, world_size, options.samples), flush=True)


def simulate_model(config: AnyConfig, world_size: int) -> str:
    """Partitions the model, and says what each rank holds of it."""
    shapes = {name: p.numel() for name, p in meta_model(config).named_parameters()}
    parameters = sum(shapes.values())
    zero = zero_config(zero_settings(config))
    lines = [
        f"{world_size} ranks, ZeRO-{zero.stage}, {config.train.precision}",
        f"model: {parameters:,} parameters in {len(shapes)} tensors",
    ]
    if zero.stage == 3:
        shares = {name: zero3_share(numel, world_size) for name, numel in shapes.items()}
        for rank in sorted({0, world_size // 2, world_size - 1}):
            partitioned = partition_as(rank, world_size, config)
            assert partitioned == shares, f"rank {rank}: DeepSpeed partitions otherwise than computed"
        padding = sum(shares.values()) * world_size - parameters
        lines.append(
            f"partition: {sum(shares.values()):,} elements on every rank, {padding:,} of padding in all; DeepSpeed's own "
            f"partitioning gives rank 0, {world_size // 2} and {world_size - 1} the same"
        )
    memory = state_memory(zero, parameters, world_size, config.train.precision)
    state = memory.weights + memory.gradients + memory.optimizer
    lines.append(f"training state: {state / 2**30:.2f} GiB a rank; `python -m train.estimate` has the rest")
    return "\n".join(lines)


def zero3_share(numel: int, world_size: int) -> int:
    """Elements of a parameter that ZeRO-3 gives to each rank: the parameter is padded to a multiple of their number."""
    return -(-numel // world_size)


def partition_as(rank: int, world_size: int, config: AnyConfig) -> dict[str, int]:
    """Elements by parameter that DeepSpeed gives to `rank` under ZeRO-3. Of the model only this rank's part stays."""
    import deepspeed

    task = build_task(config, None, torch.device("cpu"))  # its imports don't work inside zero.Init
    with fake_process_group(rank, world_size), _no_initial_values(), _default_dtype(DTYPES[config.train.precision]):
        settings = deepspeed_config(config, world_size, config.train.precision)
        for part in ("offload_optimizer", "offload_param"):  # where its shares are does not change them
            settings["zero_optimization"].pop(part, None)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model: nn.Module = task.build_model(initialise=False)
        return {name: p.ds_tensor.numel() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


class _no_initial_values(TorchDispatchMode):
    """Leaves new weights as they are: writing 140 GB of random numbers is what would take the time."""

    SKIPPED = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default, torch.ops.aten.erfinv_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.SKIPPED else func(*args, **(kwargs or {}))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New weights in the dtype that they will have: DeepSpeed would convert them, touching all their memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def simulate_data(config: AnyConfig, world_size: int, samples: int | None) -> str:
    """Gives every rank its samples of the first epoch, and checks that no sample is given twice.

    Ranks that share rows count as one.
    """
    sizes, source = _shard_sizes(config, samples)
    order = DataOrder(sizes, config.data.lanes, config.data.shuffle_block, config.train.seed)
    size, shared = data_parallel_size(config, world_size), config.train.sequence_parallel_size
    who = "every rank" if shared == 1 else f"every group of {shared} ranks that share rows"
    each = order.samples_per_epoch // size
    seen = np.zeros(order.samples, dtype=bool)
    for rank in range(size):
        ids = order.sample_ids(rank_numbers(0, rank, size, each))
        assert not seen[ids].any() and len(np.unique(ids)) == each, f"rank {rank} gets samples that were given out"
        seen[ids] = True
    left_out = order.samples - int(seen.sum())
    assert left_out == order.samples % order.lanes
    micro = micro_batch_size(config, world_size)
    return "\n".join(
        [
            f"data: {order.samples:,} samples in {len(sizes)} shards ({source})",
            f"an epoch: {each:,} samples for {who}, from {order.lanes // size} lanes; no sample twice, "
            f"{left_out:,} left out, others in each epoch",
            f"a step: {gradient_accumulation_steps(config, world_size)} x {micro} samples for {who}; "
            f"{order.samples_per_epoch / config.train.global_batch_size:,.1f} steps an epoch, {config.train.steps:,} in all",
        ]
    )


def _shard_sizes(config: AnyConfig, samples: int | None) -> tuple[list[int], str]:
    if samples is None and not is_remote(config.data.train) and Path(config.data.train).is_dir():
        return [shard.samples for shard in Manifest.read(config.data.train).shards], config.data.train
    samples = samples or 64 * config.data.lanes + 1
    full, rest = divmod(samples, SHARD_SAMPLES)
    return [SHARD_SAMPLES] * full + [rest] * (rest > 0), "assumed"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.simulate",
        description="Partition a model over many ranks and deal out its data, on one machine.",
    )
    parser.add_argument("config", help="YAML file, such as configs/language/llama_70b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--world-size", type=int, required=True, help="ranks")
    parser.add_argument("--samples", type=int, help="size of the data set, if not that of data.train")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(print_errors(main))
