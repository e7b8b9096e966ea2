"""Checkpoints of a real two-rank ZeRO-2 engine, with real damage."""

from __future__ import annotations

import json
import subprocess
import threading
import time
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


def _save(checkpoints: Checkpoints, engine, step: int) -> None:
    checkpoints.save(engine, _state(step))
    checkpoints.finish()


def _weights(engine) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


def _save_and_restore(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2)
    engine = _engine(ranks)
    for step in (1, 2, 3):
        _step(engine, ranks, step)
        _save(checkpoints, engine, step)
    drawn = torch.rand(3)
    assert checkpoints.steps() == [2, 3]  # the oldest was removed
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000003"
    exported = load_file(run_dir / "checkpoints" / "step_00000003" / "model.safetensors")
    for (name, parameter), weight in zip(engine.module.named_parameters(), exported.values(), strict=True):
        assert name in exported and torch.equal(exported[name], parameter) and weight.dtype == torch.bfloat16
    _step(engine, ranks, 4)

    other = _engine(ranks, seed=1)
    state = checkpoints.load_newest(other)
    assert state == _state(3)
    assert torch.equal(torch.rand(3), drawn)  # the random state came back
    _step(other, ranks, 4)  # and so did the optimizer's
    assert all(torch.equal(a, b) for a, b in zip(_weights(engine), _weights(other), strict=True))

    _damage(ranks, run_dir, checkpoints)


def _damage(ranks: Ranks, run_dir: Path, checkpoints: Checkpoints) -> None:
    """Each kind of damage to the newest makes the one before it load; when all are damaged, that is an error."""
    engine = _engine(ranks)
    newest = run_dir / "checkpoints" / "step_00000003"
    optimizer_file = newest / "state_00001.safetensors"
    ranks.barrier()
    if ranks.is_main:
        data = optimizer_file.read_bytes()
        optimizer_file.write_bytes(data[: len(data) // 2])
    ranks.barrier()
    assert checkpoints.load_newest(engine) == _state(2)
    assert checkpoints.steps() == [2]
    assert (run_dir / "checkpoints" / "damaged_step_00000003").is_dir()

    _step(engine, ranks, 3)
    _save(checkpoints, engine, 3)  # the same step again is saved as if nothing had happened
    assert checkpoints.steps() == [2, 3]
    ranks.barrier()
    if ranks.is_main:
        (newest / "state_00001.safetensors").unlink()
        (run_dir / "checkpoints" / "step_00000002" / "evil.pt").write_bytes(b"not named by the checksums")
    ranks.barrier()
    time.sleep(0.5 * ranks.rank)  # a rank that comes late must not look for itself at what rank 0 has renamed by then
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        checkpoints.load_newest(engine)
    assert checkpoints.steps() == []
    assert checkpoints.load_newest(engine) is None


def test_save_restore_retention_and_damage(run_distributed, tmp_path):
    run_distributed(_save_and_restore, 2, tmp_path)


def _in_background(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2, in_background=True)
    engine = _engine(ranks)
    for step in (1, 2):
        _step(engine, ranks, step)
        checkpoints.save(engine, _state(step))
    assert checkpoints.steps() == [1]  # a save waits for the one before it
    checkpoints.finish()
    _step(engine, ranks, 3)
    disk_is_slow = threading.Event()
    checkpoints._thread.submit(disk_is_slow.wait)
    checkpoints.save(engine, _state(3))
    expected = _weights(engine)
    _step(engine, ranks, 4)  # training goes on while nothing is written yet
    final = _weights(engine)
    assert not checkpoints.is_written() and checkpoints.steps() == [1, 2]
    disk_is_slow.set()
    assert checkpoints.finish() == run_dir / "checkpoints" / "step_00000003"
    assert not checkpoints.is_written() and checkpoints.finish() is None

    other = _engine(ranks, seed=1)
    assert Checkpoints(run_dir, ranks, keep=2).load_newest(other) == _state(3)
    assert all(torch.equal(a, b) for a, b in zip(_weights(other), expected, strict=True))
    _step(other, ranks, 4)
    assert all(torch.equal(a, b) for a, b in zip(_weights(other), final, strict=True))


def test_a_save_in_the_background_is_of_the_step_it_was_asked_for(run_distributed, tmp_path):
    run_distributed(_in_background, 2, tmp_path)


def _full_disk(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2)
    engine = _engine(ranks)
    _save(checkpoints, engine, 1)
    ranks.barrier()
    if ranks.is_main:
        with pytest.raises(OSError, match="No space left"), open(run_dir / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    ranks.barrier()
    for in_background in (False, True):
        checkpoints = Checkpoints(run_dir, ranks, keep=2, in_background=in_background)
        checkpoints.save(engine, _state(2))
        with pytest.raises(CheckpointError, match=r"step 2 could not be written.* it continues after step 1"):
            checkpoints.finish()
        assert checkpoints.finish() is None
    assert checkpoints.steps() == [1]
    assert not list((run_dir / "checkpoints").glob(".*.partial"))
    ranks.barrier()
    if ranks.is_main:
        (run_dir / "filler").unlink()
    ranks.barrier()
    _save(checkpoints, engine, 2)  # with room again the ranks are still in step with each other
    assert checkpoints.load_newest(engine) == _state(2)


def test_a_full_disk_loses_nothing(run_distributed, mounted, tmp_path):
    with mounted(tmp_path, "size=4M"):
        run_distributed(_full_disk, 2, tmp_path)


def _read_only(ranks: Ranks, run_dir: Path) -> None:
    checkpoints = Checkpoints(run_dir, ranks, keep=2)
    engine = _engine(ranks)
    _save(checkpoints, engine, 1)
    ranks.barrier()
    if ranks.is_main:
        subprocess.run(["mount", "-o", "remount,ro", str(run_dir)], check=True)
    ranks.barrier()
    with pytest.raises(CheckpointError, match="Read-only file system"):
        _save(checkpoints, engine, 2)
    assert checkpoints.load_newest(engine) == _state(1)


def test_a_read_only_mount_is_named(run_distributed, mounted, tmp_path):
    with mounted(tmp_path, "size=8M"):
        run_distributed(_read_only, 2, tmp_path)


def test_a_checkpoint_is_described_by_json(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps(_state(5).__dict__))
    assert State.read(tmp_path) == _state(5)
