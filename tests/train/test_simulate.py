"""Jobs of many ranks, simulated: partitioning by DeepSpeed itself, and the data of every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.config import load_config
from train.simulate import main, partition_as, zero3_share

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_70_billion_parameters_on_1024_ranks():
    command = [sys.executable, "-m", "train.simulate", "configs/language/llama_70b.yaml", "--world-size=1024"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "68,989,231,104 parameters" in ran.stdout and "67,372,296 elements on every rank" in ran.stdout
    assert "960 samples for every rank, from 15 lanes; no sample twice" in ran.stdout


def test_parameters_that_do_not_divide_are_padded():
    world_size = 24
    config = load_config(
        "configs/vision/quickstart.yaml",
        [
            f"train.global_batch_size={world_size}",
            "train.precision=fp32",
            "deepspeed.config=configs/deepspeed/zero3_nvme.json",  # partitioned alike, with no such disk
        ],
    )
    last = partition_as(world_size - 1, world_size, config)
    assert last["head.bias"] == zero3_share(10, world_size) == 1
    assert last["blocks.0.attn.qkv.weight"] == 192 * 3 * 192 // world_size
    assert not torch.distributed.is_initialized() and torch.get_default_dtype() == torch.float32


def test_ranks_that_share_rows_get_the_same_samples(capsys):
    main(["configs/language/quickstart.yaml", "train.sequence_parallel_size=4", "--world-size=16", "--samples=9600"])
    printed = capsys.readouterr().out
    assert "an epoch: 2,400 samples for every group of 4 ranks that share rows, from 240 lanes; no sample" in printed
    assert "a step: 1 x 2 samples for every group of 4 ranks" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size=1000"], r"data.lanes is 15360; it must be a multiple of the number of ranks, 1000"),
        (["--world-size=1536"], r"train.global_batch_size is 1024; it must be a multiple of the number of ranks, 1536"),
        (["--world-size=1024", "--samples=15359"], r"data.lanes is 15360, but the data set has only 15359 samples"),
    ],
    ids=["lanes", "global batch", "samples"],
)
def test_uneven_jobs_are_refused_with_the_reason(arguments, message):
    # A small model: the last is refused when its data is dealt out.
    small = ["model.layers=1", "model.width=64", "model.heads=8", "model.mlp_width=64"]
    with pytest.raises(ValueError, match=message):
        main(["configs/language/llama_70b.yaml", *small, *arguments])
