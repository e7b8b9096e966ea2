"""ZeRO partitions the training state, not the training: all stages, with all that can be added to them, take the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from train.config import load_config
from train.distributed import Ranks
from train.engine import build_engine, full_state_dict, gradient_norm, loss_scale, set_learning_rate
from train.models.language import LanguageModel

SMALL = ["model.vocab_size=65", "model.layers=3", "model.width=36", "model.heads=2", "model.mlp_width=51"]
CLIPPED = "optimizer.grad_clip=0.5"  # below the norms of all steps
# Sums over ranks, partitions and micro-batches are taken in another order.
FLOAT32 = 1e-6
HALF = 1e-3  # gradients keep 8 or 11 bits, and AdamW's steps for small ones may turn round


def _train(
    ranks: Ranks, directory: Path, name: str, *overrides: str, precision: str = "fp32", recompute: int = 0, **zero: Any
) -> list[float]:
    """Losses of four steps over 8 rows, of all ranks together, with configs/deepspeed/NAME.json, in which `zero` is set."""
    settings = json.loads(Path(f"configs/deepspeed/{name}.json").read_text())
    settings["zero_optimization"] |= zero
    file = directory / f"{ranks.rank}.json"
    file.write_text(json.dumps(settings))
    overrides = (*SMALL, "train.global_batch_size=8", f"deepspeed.config={file}", *overrides)
    config = load_config("configs/language/quickstart.yaml", list(overrides))
    torch.manual_seed(0)
    engine = build_engine(LanguageModel(config.model, recompute), config, ranks.world_size, precision)
    tokens = torch.randint(65, (8, 17), generator=torch.Generator().manual_seed(1))[ranks.rank :: ranks.world_size]
    if name != "zero0":  # the files' buckets are for large models
        assert engine.zero_reduce_bucket_size() == sum(
            getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()
        )
    losses = []
    for _ in range(4):
        total = torch.zeros((), dtype=torch.float64)
        for rows in tokens.split(engine.train_micro_batch_size_per_gpu()):
            loss = engine(rows[:, :-1], targets=rows[:, 1:]).sum()
            engine.backward(loss * ranks.world_size / (8 * 16), scale_wrt_gas=False)
            set_learning_rate(engine, 1e-2)
            engine.step()
            total += loss.detach()
        losses.append(ranks.sum_floats(total).item() / (8 * 16))
        norm = gradient_norm(engine)
        assert norm is None if name == "zero0" and precision == "fp32" else norm > 0
    assert loss_scale(engine) == (65536.0 if precision == "fp16" else None)
    weights = full_state_dict(engine, ranks.is_main)
    assert bool(weights) == ranks.is_main
    return losses


def _all_stages(ranks: Ranks, directory: Path) -> None:
    expected = _train(ranks, directory, "zero0", CLIPPED)
    assert expected[-1] < expected[0] - 0.2
    (directory / "losses.json").write_text(json.dumps(expected))
    losses = {}
    for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        losses[name] = _train(ranks, directory, name, CLIPPED)
        assert losses[name] == pytest.approx(expected, rel=FLOAT32), name
    assert losses["zero2_offload"] == losses["zero2"]
    # Its parameters are so small that the file's own threshold would leave them all unpartitioned.
    partitioned = _train(ranks, directory, "zero3", CLIPPED, stage3_param_persistence_threshold=0)
    assert partitioned == pytest.approx(expected, rel=FLOAT32)

    unclipped = _train(ranks, directory, "zero2")
    assert unclipped != losses["zero2"]
    for recompute in (1, 2):  # every block, every other
        assert _train(ranks, directory, "zero2", CLIPPED, recompute=recompute) == losses["zero2"]
    accumulated = _train(ranks, directory, "zero3", CLIPPED, "train.micro_batch_size=2", recompute=1)
    assert accumulated == pytest.approx(expected, rel=FLOAT32)

    for precision, names in {"bf16": ["zero0", "zero2", "zero3"], "fp16": ["zero1", "zero3"]}.items():
        for name in names:
            if precision == "fp16" and not get_accelerator().is_fp16_supported():
                with pytest.raises(ValueError, match="train.precision is fp16, in which DeepSpeed does not train"):
                    _train(ranks, directory, name, precision=precision)
                continue
            half = _train(ranks, directory, name, CLIPPED, "train.micro_batch_size=2", precision=precision)
            assert half == pytest.approx(expected, rel=HALF), (precision, name)


def _other_world_sizes(ranks: Ranks, directory: Path) -> None:
    expected = json.loads((directory / "losses.json").read_text())
    for name in ("zero2", "zero3"):
        assert _train(ranks, directory, name, CLIPPED) == pytest.approx(expected, rel=FLOAT32), name


def _compiled(ranks: Ranks, directory: Path) -> None:
    _other_world_sizes(ranks, directory)
    expected = json.loads((directory / "losses.json").read_text())
    compiled = _train(ranks, directory, "zero2", CLIPPED, "train.compile=true", recompute=2)
    assert compiled == pytest.approx(expected, rel=FLOAT32)
    with pytest.raises(ValueError, match=r"train.compile is true, but deepspeed.config=.* is stage 3"):
        _train(ranks, directory, "zero3", "train.compile=true")


@pytest.mark.long
def test_all_stages_on_any_number_of_ranks_take_the_same_steps(run_distributed, tmp_path):
    run_distributed(_all_stages, 2, tmp_path)
    run_distributed(_other_world_sizes, 4, tmp_path)
    run_distributed(_compiled, 1, tmp_path)
