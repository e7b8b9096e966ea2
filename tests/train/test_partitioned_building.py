"""At ZeRO stage 3 a model is built that no rank could hold whole."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.config import AnyConfig, load_config
from train.distributed import Ranks
from train.engine import build_engine, build_model, full_state_dict, writable
from train.tasks import build_task
from train.weights import copy_weights, find_weights

DEEP = ["model.width=384", "model.heads=6", "model.layers=24", "train.precision=bf16"]
M_MMAP_THRESHOLD = -3  # malloc.h
STAGE_3 = "deepspeed.config=configs/deepspeed/zero3.json"


def _config(task: str, *settings: str) -> AnyConfig:
    """Of a model of 85 MB in bf16."""
    mlp = ["model.mlp_width=1024"] if task == "language" else []
    return load_config(f"configs/{task}/quickstart.yaml", [*DEEP, *mlp, STAGE_3, *settings])


def _peak_bytes() -> int:
    """The largest resident memory of this process since the last call."""
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def _build(ranks: Ranks, task_name: str) -> None:
    config = _config(task_name)
    task = build_task(config, None, ranks.device)
    # Else the C library keeps the room of parameters that were whole for a moment, between shares that stay.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    _peak_bytes()
    before = _peak_bytes()
    torch.manual_seed(0)
    model = build_model(task, config, ranks.world_size, "bf16")
    ranks.barrier()  # before the other rank frees what it holds
    grown = _peak_bytes() - before
    whole = 2 * sum(parameter.ds_numel for parameter in model.parameters())
    print(f"rank {ranks.rank}: whole {whole / 1e6:.0f} MB, grown by {grown / 1e6:.0f} MB")
    # Half of it is this rank's own. Built whole in float32 first, it would take twice `whole`.
    assert whole > 80e6 and grown < 0.9 * whole

    engine = build_engine(model, config, ranks.world_size, "bf16")
    partitioned = full_state_dict(engine, is_main=True)
    torch.manual_seed(0)
    for name, weight in task.build_model().state_dict().items():
        assert torch.equal(partitioned[name], weight.bfloat16()), name


@pytest.mark.parametrize("task", ["language", "vision"])
def test_a_partitioned_model_is_never_whole_and_has_the_same_weights(run_distributed, task):
    run_distributed(_build, 2, task)


def _load(ranks: Ranks, file: Path) -> None:
    config = _config("vision", "model.layers=2", f"model.init_from={file}")
    task = build_task(config, None, ranks.device)
    torch.manual_seed(1)
    weights = task.build_model().state_dict()
    if ranks.is_main:
        save_file(weights, file)
    ranks.barrier()
    model = build_model(task, config, ranks.world_size, "bf16")
    copy_weights(model, find_weights(model, file), writable, read=ranks.is_main)
    assert all(parameter.numel() == 0 for parameter in model.parameters())  # but for this rank's share
    partitioned = full_state_dict(build_engine(model, config, ranks.world_size, "bf16"), is_main=True)
    assert all(torch.equal(partitioned[name], weights[name].bfloat16()) for name in weights)

    other = build_model(build_task(_config("vision", "model.layers=1"), None, ranks.device), config, 2, "bf16")
    with pytest.raises(ValueError, match=r"holds another model: blocks.1.*12 in all do not fit"):
        find_weights(other, file)


def test_weights_from_elsewhere_are_loaded_into_shares(run_distributed, tmp_path):
    run_distributed(_load, 2, tmp_path / "model.safetensors")
