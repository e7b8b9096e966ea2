"""ZeRO partitions the training state, not the training: all stages take the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train.config import load_config
from train.distributed import Ranks
from train.engine import build_engine, full_state_dict, gradient_norm, set_learning_rate
from train.models.language import LanguageModel

SMALL = ["model.vocab_size=64", "model.layers=3", "model.width=32", "model.mlp_width=64", "model.sequence_length=16"]


def _losses(ranks: Ranks, stage: int, directory: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of four float32 steps on two ranks with blocks recomputed, and the weights after them."""
    settings = {"stage": stage, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
    file = directory / f"zero{stage}_{ranks.rank}.json"
    file.write_text(json.dumps({"zero_optimization": settings}))
    overrides = [*SMALL, "train.global_batch_size=4", f"deepspeed.config={file}"]
    config = load_config("configs/language/quickstart.yaml", overrides)
    torch.manual_seed(0)
    engine = build_engine(LanguageModel(config.model, activation_checkpointing=2), config, ranks.world_size, "fp32")
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1))[ranks.rank :: 2]
    losses = []
    for _ in range(4):
        loss = engine(tokens[:, :-1], targets=tokens[:, 1:]).mean()
        engine.backward(loss, scale_wrt_gas=False)
        set_learning_rate(engine, 1e-2)
        engine.step()
        norm = gradient_norm(engine)
        assert norm is None if stage == 0 else norm > 0
        losses.append(loss.item())
    return losses, full_state_dict(engine, ranks.is_main)


def _all_stages(ranks: Ranks, directory: Path) -> None:
    expected, expected_weights = _losses(ranks, 0, directory)
    assert expected[-1] < expected[0] - 0.5
    assert bool(expected_weights) == ranks.is_main
    for stage in (1, 2, 3):
        losses, weights = _losses(ranks, stage, directory)
        # Sums over ranks and partitions are taken in another order.
        assert losses == pytest.approx(expected, rel=1e-5)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-4)


def test_all_stages_take_the_same_steps(run_distributed, tmp_path):
    run_distributed(_all_stages, 2, tmp_path)
