"""A checkpoint continues on any number of ranks, at any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file

from train.checkpoint import Checkpoints, State
from train.config import load_config
from train.distributed import Ranks
from train.engine import build_engine, full_state_dict, loss_scale, set_learning_rate
from train.models.language import LanguageModel

# The one half precision whose state has more to it, a loss scale; DeepSpeed trains in it on some processors only.
SCALED = "fp16" if get_accelerator().is_fp16_supported() else "bf16"
# Odd sizes, so that no parameter divides evenly by the number of ranks.
SMALL = ["model.vocab_size=65", "model.layers=2", "model.width=36", "model.heads=2", "model.mlp_width=51"]
WRITTEN = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (2, "bf16"),
    (3, "bf16"),
    (1, SCALED),
]  # stage and precision
# Stage and precision of a checkpoint, and the stage that continues it: every stage reads and is read.
ON_FOUR_RANKS = [(0, "fp32", 1), (1, "fp32", 2), (2, "fp32", 3), (3, "fp32", 0), (2, "bf16", 3), (1, SCALED, 3)]
ON_ONE_RANK = [(0, "fp32", 2), (1, "fp32", 3), (2, "fp32", 0), (3, "fp32", 1), (3, "bf16", 0)]


def _engine(ranks: Ranks, directory: Path, stage: int, precision: str, seed: int):
    settings = {"stage": stage, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 100}
    file = directory / f"zero{stage}_{ranks.rank}.json"
    file.write_text(json.dumps({"zero_optimization": settings}))
    overrides = [*SMALL, "train.global_batch_size=4", f"deepspeed.config={file}"]
    config = load_config("configs/language/quickstart.yaml", overrides)
    torch.manual_seed(seed)
    return build_engine(LanguageModel(config.model), config, ranks.world_size, precision)


def _step(engine, ranks: Ranks, step: int) -> None:
    tokens = torch.randint(65, (4, 9), generator=torch.Generator().manual_seed(step))[ranks.rank :: ranks.world_size]
    engine.backward(engine(tokens[:, :-1], targets=tokens[:, 1:]).mean(), scale_wrt_gas=False)
    set_learning_rate(engine, 1e-2)
    engine.step()


def _write(ranks: Ranks, directory: Path) -> None:
    """In each case, a checkpoint after two steps, and the weights after a third."""
    for stage, precision in WRITTEN:
        engine = _engine(ranks, directory, stage, precision, seed=0)
        if precision == "fp16":
            engine.optimizer.loss_scaler.cur_scale = 1024.0
        for step in (1, 2):
            _step(engine, ranks, step)
        checkpoints = Checkpoints(directory / f"{stage}{precision}", ranks, keep=1)
        checkpoints.save(engine, State(2, 8, ranks.world_size, stage, {}, ""))
        checkpoints.finish()
        _step(engine, ranks, 3)
        weights = full_state_dict(engine, ranks.is_main)
        if ranks.is_main:
            save_file(weights, directory / f"{stage}{precision}" / "expected.safetensors")


def _continue(ranks: Ranks, directory: Path, cases: list[tuple[int, str, int]]) -> None:
    for written_stage, precision, stage in cases:
        run = directory / f"{written_stage}{precision}"
        engine = _engine(ranks, directory, stage, precision, seed=1)
        state = Checkpoints(run, ranks, keep=1).load_newest(engine)
        assert state is not None and (state.step, state.world_size, state.zero_stage) == (2, 2, written_stage)
        assert loss_scale(engine) == (1024.0 if precision == "fp16" else None)
        saved = load_file(run / "checkpoints" / "step_00000002" / "model.safetensors")
        for name, weight in full_state_dict(engine, is_main=True).items():
            assert torch.equal(weight, saved[name])
        _step(engine, ranks, 3)  # which needs the moments and AdamW's step
        expected = load_file(run / "expected.safetensors")
        for name, weight in full_state_dict(engine, is_main=True).items():
            # Gradients are summed over ranks in another order: in half precision their last bit differs, and the weights' too.
            tolerance = dict(rtol=1e-5, atol=1e-6) if precision == "fp32" else dict(rtol=2**-7, atol=2**-11)
            torch.testing.assert_close(weight, expected[name], **tolerance)


@pytest.mark.long
def test_any_number_of_ranks_and_any_stage(run_distributed, tmp_path):
    run_distributed(_write, 2, tmp_path)
    run_distributed(_continue, 4, tmp_path, ON_FOUR_RANKS)
    run_distributed(_continue, 1, tmp_path, ON_ONE_RANK)
