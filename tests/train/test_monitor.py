"""metrics.jsonl and TensorBoard, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.monitor import Monitor, StepRecord


def _record(step: int, loss: float) -> StepRecord:
    seconds = {"data": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.4}
    return StepRecord(step, 8 * step, loss, f"{step:016x}", 1e-3, 0.5, 1000, seconds)


def _train(run_dir: Path, first: int, last: int, offset: float = 0.0) -> None:
    monitor = Monitor(run_dir, first - 1, 10, "tokens", 2, (1e6, 2e6), "task: language\n")
    for step in range(first, last + 1):
        monitor.step(_record(step, step + offset))
    monitor.validation(last, {"loss": 3.0})
    monitor.example("prompts", "> once upon a time", last)
    monitor.example("images", torch.rand(3, 8, 8), last)
    monitor.close()


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_every_step_is_one_line(tmp_path):
    _train(tmp_path, 1, 3)
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": n, "samples": 8 * n, "loss": float(n), "batch_hash": f"{n:016x}"} for n in (1, 2, 3)
    ]
    assert _lines(tmp_path / "validation.jsonl") == [{"step": 3, "loss": 3.0}]


def test_resuming_cuts_what_lies_past_the_checkpoint(tmp_path):
    _train(tmp_path, 1, 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line
    _train(tmp_path, 5, 6, offset=100.0)  # from a checkpoint of step 4
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(2, 1.5), (4, 3.5), (6, 105.5)]


def test_tensorboard_has_what_a_person_looks_for(tmp_path):
    _train(tmp_path, 1, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert scalars["speed/tokens_per_second"] == 1000
    assert round(scalars["speed/data_wait_percent"], 3) == 10
    assert scalars["speed/model_teraflops"] == pytest.approx(1000 * 1e6 / 1e12)
    assert {
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "memory/host_peak_gib",
        "loss/validation",
    } <= scalars.keys()
    assert {f"step_seconds/{part}" for part in ("data", "forward", "backward", "optimizer")} <= scalars.keys()
    assert "optimizer/loss_scale" not in scalars  # bf16 has none
    assert events.Tags()["images"] == ["images"]
    assert events.Tags()["tensors"] == ["config/text_summary", "prompts/text_summary"]


def test_a_full_disk_leaves_neither_gaps_nor_half_lines(mounted, filled, tmp_path, capsys):
    with mounted(tmp_path, "size=1M"):
        monitor = Monitor(tmp_path, 0, 1000, "tokens", 2, (1e6, 2e6), "task: language\n")
        monitor.step(_record(1, 1.0))
        with filled(tmp_path):
            for step in range(2, 301):  # more than the files' last pages have room for
                monitor.step(_record(step, step))
            monitor.validation(300, {"loss": 3.0})
            monitor.example("images", torch.rand(3, 64, 64), 300)
            said = capsys.readouterr().err
            assert said.count("metrics.jsonl can't be written (No space left on device)") == 1
            assert len(_whole_lines(tmp_path / "metrics.jsonl")) < 300
        monitor.step(_record(301, 301.0))
        monitor.close()
        assert "metrics.jsonl can be written again, and nothing is missing from it" in capsys.readouterr().err
        assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == list(range(1, 302))
        assert _lines(tmp_path / "validation.jsonl") == [{"step": 300, "loss": 3.0}]
        events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("loss/train")] == list(range(2, 301, 2))
        assert [event.step for event in events.Images("images")] == [300]


def test_what_could_not_be_written_to_the_end_is_said(mounted, filled, tmp_path, capsys):
    with mounted(tmp_path, "size=64k"):
        monitor = Monitor(tmp_path, 0, 1000, "tokens", 100, (1e6, 2e6), "task: language\n")
        with filled(tmp_path):
            monitor.step(_record(1, 1.0))
            monitor.close()
        size = len(json.dumps({"step": 1, "samples": 8, "loss": 1.0, "batch_hash": f"{1:016x}"})) + 1
        assert f"the last {size} bytes of {tmp_path / 'metrics.jsonl'} could not be written" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_start_is_the_users_to_mend(mounted, filled, tmp_path):
    with mounted(tmp_path, "size=64k"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        with (
            filled(tmp_path),
            pytest.raises(ValueError, match=r"metrics.jsonl can't be written \(No space left.*make room"),
        ):
            Monitor(tmp_path, 1, 10, "tokens", 2, (1e6, 2e6), "task: language\n")
