"""`python -m train.estimate CONFIG [key=value ...] --gpus 512 --gpu h100`: what a run needs, before there is a GPU.

Nothing is trained and no GPU is needed; the model is never in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed would look for one and say that it found none

import torch

from train.config import AnyConfig, load_config
from train.data.manifest import Manifest
from train.data.order import check_world_size
from train.data.storage import is_remote
from train.estimate import report
from train.estimate.activations import meta_model
from train.estimate.gpus import GBIT, GPUS
from train.tasks import build_task
from train.trained import print_errors


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    plan = make_plan(load_config(options.config, options.overrides), options)
    sections = [
        ("MODEL AND CLUSTER", report.model(plan)),
        ("MEMORY", report.memory(plan)),
        ("FLOPS", report.compute(plan)),
        ("COMMUNICATION", report.communication(plan)),
        (
            "TIME AND COST: an estimate from the assumptions named",
            report.time_and_cost(plan, options.dollars_per_gpu_hour),
        ),
        ("STORAGE", report.storage(plan, options.filesystem_gb_per_s * 1e9)),
    ]
    print("\n\n".join(f"{title}\n{text}" for title, text in sections))


def make_plan(config: AnyConfig, options: argparse.Namespace) -> report.Plan:
    """Raises ValueError where the config can't be trained on that many GPUs, or the nodes can't be filled."""
    gpus, per_node = options.gpus, options.gpus_per_node
    if gpus < 1 or per_node < 1 or (gpus > per_node and gpus % per_node):
        raise ValueError(
            f"--gpus is {gpus}; it must be at most --gpus-per-node, {per_node}, or a multiple of it: nodes are filled"
        )
    check_world_size(config, gpus)
    if config.train.precision == "auto":
        config.train.precision = "bf16"  # all of the table's GPUs have it
    if config.train.precision == "fp32":
        raise ValueError("train.precision is fp32; a plan needs bf16 or fp16, whose peak the table of GPUs has")
    gpu = GPUS[options.gpu]
    if options.network_gbit is not None:
        gpu = dataclasses.replace(gpu, network=options.network_gbit * GBIT, source=f"{gpu.source}; --network-gbit")
    samples, sample_bytes = options.samples, report.sample_bytes(config)
    if not is_remote(config.data.train) and Path(config.data.train).is_dir():
        manifest = Manifest.read(config.data.train)
        samples = samples or manifest.samples
        sample_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.samples
    task = build_task(config, None, torch.device("cpu"))
    return report.Plan(config, task, meta_model(config), gpu, gpus, per_node, samples, sample_bytes)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.estimate",
        description="Memory, FLOPs, communication, time and storage of a run, computed without a GPU.",
    )
    parser.add_argument("config", help="YAML file, such as configs/language/llama_70b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--gpus", type=int, required=True, help="in all: the number of ranks")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="kind; train/estimate/gpus.py has their numbers")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--network-gbit", type=float, help="Gb/s between nodes for each GPU, in place of the table's")
    parser.add_argument("--samples", type=int, help="text rows or images in the data set, where it isn't here")
    parser.add_argument(
        "--filesystem-gb-per-s", type=float, default=10.0, help="of all nodes together, for checkpoints"
    )
    parser.add_argument("--dollars-per-gpu-hour", type=float)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(print_errors(main))
