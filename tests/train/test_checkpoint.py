"""Checkpoints of a real two-rank ZeRO-2 engine, with real damage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from train.checkpoint import CheckpointError, Checkpoints, State
from train.config import load_config
from train.distributed import Ranks
from train.engine import build_engine


def _engine(ranks: Ranks, seed: int = 0):
    config = load_config("configs/language/quickstart.yaml", ["train.global_batch_size=4"])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    return build_engine(model, config, ranks.world_size, "bf16")


def _step(engine, ranks: Ranks, step: int) -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(10 * step + ranks.rank)).bfloat16()
    engine.backward((engine(x).float() - 1).pow(2).mean(), scale_wrt_gas=False)
    engine.step()


def _state(step: int) -> State:
    return State(step, 4 * step, 2, 2, {"train.seed": 1}, "data")


def _weights(engine) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


def _save_and_restore(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2)
    engine = _engine(ranks)
    for step in (1, 2, 3):
        _step(engine, ranks, step)
        checkpoints.save(engine, _state(step))
    drawn = torch.rand(3)
    assert checkpoints.steps() == [2, 3]  # the oldest was removed
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000003"
    exported = load_file(run_dir / "checkpoints" / "step_00000003" / "model.safetensors")
    for (name, parameter), weight in zip(engine.module.named_parameters(), exported.values(), strict=True):
        assert name in exported and torch.equal(exported[name], parameter) and weight.dtype == torch.bfloat16
    _step(engine, ranks, 4)

    other = _engine(ranks, seed=1)
    state = checkpoints.load_newest(other, ranks.world_size)
    assert state == _state(3)
    assert torch.equal(torch.rand(3), drawn)  # the random state came back
    _step(other, ranks, 4)  # and so did the optimizer's
    assert all(torch.equal(a, b) for a, b in zip(_weights(engine), _weights(other), strict=True))

    with pytest.raises(ValueError, match="was written by 2 ranks and this job has 4: start it with 2"):
        checkpoints.load_newest(other, world_size=4)

    _damage(ranks, run_dir, checkpoints)


def _damage(ranks: Ranks, run_dir: Path, checkpoints: Checkpoints) -> None:
    """Each kind of damage to the newest makes the one before it load; when all are damaged, that is an error."""
    engine = _engine(ranks)
    newest = run_dir / "checkpoints" / "step_00000003"
    optimizer_file = newest / "engine" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    ranks.barrier()
    if ranks.is_main:
        data = optimizer_file.read_bytes()
        optimizer_file.write_bytes(data[: len(data) // 2])
    ranks.barrier()
    assert checkpoints.load_newest(engine, 2) == _state(2)
    assert checkpoints.steps() == [2]
    assert (run_dir / "checkpoints" / "damaged_step_00000003").is_dir()

    _step(engine, ranks, 3)
    checkpoints.save(engine, _state(3))  # the same step again is saved as if nothing had happened
    assert checkpoints.steps() == [2, 3]
    ranks.barrier()
    if ranks.is_main:
        (newest / "rng_00001.pt").unlink()
        (run_dir / "checkpoints" / "step_00000002" / "engine" / "evil.pt").write_bytes(b"not named by the checksums")
    ranks.barrier()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        checkpoints.load_newest(engine, 2)
    assert checkpoints.steps() == []
    assert checkpoints.load_newest(engine, 2) is None


def test_save_restore_retention_and_damage(run_distributed, tmp_path):
    run_distributed(_save_and_restore, 2, tmp_path)


def _full_disk(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2)
    engine = _engine(ranks)
    checkpoints.save(engine, _state(1))
    ranks.barrier()
    if ranks.is_main:
        with pytest.raises(OSError, match="No space left"), open(run_dir / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    ranks.barrier()
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.* it continues after step 1"):
        checkpoints.save(engine, _state(2))
    assert checkpoints.steps() == [1]
    assert not list((run_dir / "checkpoints").glob(".*.partial"))
    ranks.barrier()
    if ranks.is_main:
        (run_dir / "filler").unlink()
    ranks.barrier()
    checkpoints.save(engine, _state(2))  # with room again the ranks are still in step with each other
    assert checkpoints.load_newest(engine, 2) == _state(2)


def test_a_full_disk_loses_nothing(run_distributed, mounted, tmp_path):
    with mounted(tmp_path, "size=4M"):
        run_distributed(_full_disk, 2, tmp_path)


def _read_only(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2)
    engine = _engine(ranks)
    checkpoints.save(engine, _state(1))
    ranks.barrier()
    if ranks.is_main:
        subprocess.run(["mount", "-o", "remount,ro", str(run_dir)], check=True)
    ranks.barrier()
    with pytest.raises(CheckpointError, match="Read-only file system"):
        checkpoints.save(engine, _state(2))
    assert checkpoints.load_newest(engine, 2) == _state(1)


def test_a_read_only_mount_is_named(run_distributed, mounted, tmp_path):
    with mounted(tmp_path, "size=8M"):
        run_distributed(_read_only, 2, tmp_path)


def test_a_checkpoint_is_described_by_json(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps(_state(5).__dict__))
    assert State.read(tmp_path) == _state(5)
