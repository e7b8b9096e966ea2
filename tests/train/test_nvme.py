"""Offloading to NVMe changes where the training state is, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from train import nvme, training_state
from train.checkpoint import Checkpoints, State
from train.config import AnyConfig, load_config
from train.distributed import Ranks
from train.engine import build_engine, build_model, deepspeed_config, full_state_dict, set_learning_rate, zero_settings
from train.tasks import build_task

STEPS = 2


def _config(directory: Path, name: str) -> AnyConfig:
    """configs/deepspeed/NAME.json, with its folder for NVMe in `directory`, and several flat tensors a rank."""
    settings = json.loads(Path(f"configs/deepspeed/{name}.json").read_text())
    zero = settings["zero_optimization"] | {"sub_group_size": 500_000}
    for part in ("offload_optimizer", "offload_param"):
        if zero[part]["device"] == "nvme":
            zero[part]["nvme_path"] = str(directory / "nvme")
    file = directory / f"{name}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    overrides = ["model.layers=3", "train.global_batch_size=4", f"deepspeed.config={file}"]
    return load_config("configs/language/quickstart.yaml", overrides)


def _engine(config: AnyConfig, ranks: Ranks):
    torch.manual_seed(0)
    task = build_task(config, None, ranks.device)
    return build_engine(build_model(task, config, ranks.world_size, "bf16"), config, ranks.world_size, "bf16")


def _train(config: AnyConfig, ranks: Ranks, engine) -> list[float]:
    task, losses = build_task(config, None, ranks.device), []
    for _ in range(STEPS):
        torch.manual_seed(ranks.rank)
        loss = task.loss_sum(engine, task.placeholder_batch(2), 0)
        engine.backward(loss / 1024, scale_wrt_gas=False)
        set_learning_rate(engine, 1e-3)
        engine.step()
        losses.append(loss.item())
    return losses


def _compare(ranks: Ranks, directory: Path) -> None:
    found = {}
    for name in ("zero3_offload", "zero3_nvme"):
        config = _config(directory / str(ranks.rank), name)
        nvme.prepare(config, zero_settings(config))
        engine = _engine(config, ranks)
        before = {key: tensor.clone() for key, tensor in training_state.collect(engine)[0].items() if key[0] != "r"}
        losses = _train(config, ranks, engine)
        checkpoints = Checkpoints(directory / name, ranks, keep=1, in_background=name == "zero3_nvme")
        checkpoints.save(engine, State(STEPS, 0, ranks.world_size, 3, {}, ""))
        losses += _train(config, ranks, engine)
        checkpoints.finish()
        after = {key: tensor.clone() for key, tensor in training_state.collect(engine)[0].items() if key[0] != "r"}
        engine.destroy()
        found[name] = losses, before, after, full_state_dict(engine, is_main=True)
    (losses, *state), (nvme_losses, *nvme_state) = found.values()
    assert losses == nvme_losses and losses[-1] < losses[0]
    for expected, tensors in zip(state, nvme_state, strict=True):
        assert expected.keys() == tensors.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)

    # Either continues the other's checkpoint.
    for name, other in (("zero3_nvme", "zero3_offload"), ("zero3_offload", "zero3_nvme")):
        config = _config(directory / str(ranks.rank), name)
        engine = _engine(config, ranks)
        assert Checkpoints(directory / other, ranks, keep=1).load_newest(engine).step == STEPS
        assert _train(config, ranks, engine) == losses[STEPS:]
        engine.destroy()


@pytest.mark.long
def test_it_trains_saves_and_resumes_as_in_memory(run_distributed, tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("offloading to NVMe needs libaio's header (libaio-dev) and a C++ compiler")
    for rank in (0, 1):
        (tmp_path / str(rank) / "nvme").mkdir(parents=True)
    run_distributed(_compare, 2, tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    config = _config(tmp_path, "zero3_nvme")
    with pytest.raises(ValueError, match=rf"nvme_path {tmp_path}/nvme can't be written on .*No such file"):
        nvme.prepare(config, zero_settings(config))


def test_each_run_has_a_folder_of_its_own(tmp_path):
    config = _config(tmp_path, "zero3_nvme")
    first = nvme.folders(config, zero_settings(config))
    config.run.dir = "another"
    assert set(first) == {"offload_optimizer", "offload_param"}
    assert not set(first.values()) & set(nvme.folders(config, zero_settings(config)).values())
    assert deepspeed_config(config, 2, "bf16")["zero_optimization"]["offload_param"]["nvme_path"].startswith(
        f"{tmp_path}/nvme/"
    )
