"""At ZeRO stage 3 a model is built that no rank could hold whole."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from train.config import load_config
from train.distributed import Ranks
from train.engine import build_engine, build_model, full_state_dict
from train.tasks import build_task

CONFIG = "configs/language/quickstart.yaml"
STAGE_3 = "deepspeed.config=configs/deepspeed/zero3.json"


def _peak_bytes() -> int:
    """The largest resident memory of this process since the last call."""
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def _build(ranks: Ranks) -> None:
    deep = ["model.width=384", "model.heads=6", "model.mlp_width=1024", "model.layers=24", "train.precision=bf16"]
    config = load_config(CONFIG, [*deep, STAGE_3])
    task = build_task(config, None, ranks.device)
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


def test_a_partitioned_model_is_never_whole_and_has_the_same_weights(run_distributed, monkeypatch):
    # Else the C library keeps the room of parameters that were whole for a moment, between shares that stay.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    run_distributed(_build, 2)
