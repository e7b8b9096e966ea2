"""Everything a user can get wrong ends in one clear line, an exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LANGUAGE = "configs/language/quickstart.yaml"
VISION = "configs/vision/quickstart.yaml"
SHORT = [
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "train.steps=4",
    "checkpoint.every_steps=2",
    "train.global_batch_size=4",
    "schedule.warmup_steps=1",
    "evaluate.prompts=[]",
]
LARGE = ["model.layers=6", "model.width=256"]  # 60 MB a checkpoint


def _fails(job, *expected: str, code: int = 2) -> None:
    """One line that starts with `error:` and holds all of `expected`; no traceback."""
    assert job.wait(timeout=120) == code, job.output
    errors = [line for line in job.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, job.output
    assert all(text in errors[0] for text in expected), errors[0]
    assert "Traceback" not in job.output


def _copy(data: Path, to: Path) -> Path:
    shutil.copytree(data, to)
    return to


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.heds=3", ["unknown key model.heds", "heads"]),
        ("train.steps=many", ["train.steps", "many"]),
        ("model.heads=5", ["model.heads", "5", "256"]),
        ("train.micro_batch_size=3", ["train.micro_batch_size", "3"]),
        ("data.lanes=96000", ["data.lanes", "96000"]),
        ("model.vocab_size=5000", ["model.vocab_size", "5000", "1024"]),
        ("model.sequence_length=128", ["model.sequence_length", "128", "256"]),
        ("data.train=nowhere", ["data.train", "nowhere", "python -m train.prepare"]),
        ("data.train=pipe:cat /tmp", ["data.allow_pipe"]),
        ("run.dir=/proc/nowhere", ["run.dir=/proc/nowhere", "can't be written"]),
        ("model.init_from=nowhere", ["nowhere", "no checkpoint"]),
        ("deepspeed.config=nowhere.json", ["deepspeed.config", "nowhere.json"]),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "",
)
def test_an_impossible_setting(launch, wikipedia, tmp_path, override, expected):
    _fails(launch(LANGUAGE, tmp_path, override, launcher="python"), *expected)


@pytest.mark.parametrize("override", ["data.lanes=961", "train.global_batch_size=15"])
def test_a_setting_that_two_ranks_do_not_divide(launch, wikipedia, tmp_path, override):
    key, _, value = override.partition("=")
    _fails(launch(LANGUAGE, tmp_path, override), key, value, "2")


def test_a_truncated_shard(launch, wikipedia, tmp_path):
    data = _copy(wikipedia, tmp_path / "data")
    shard = sorted((data / "train").glob("*.tar"))[3]
    os.truncate(shard, 1000)
    _fails(launch(LANGUAGE, tmp_path / "run", f"data.train={data}/train", *SHORT), shard.name, "truncated", "verify")


def test_a_manifest_of_other_shards(launch, wikipedia, tmp_path):
    data = _copy(wikipedia, tmp_path / "data")
    manifest = json.loads((data / "train" / "manifest.json").read_text())
    manifest["shards"][0]["samples"] += 7
    (data / "train" / "manifest.json").write_text(json.dumps(manifest))
    job = launch(LANGUAGE, tmp_path / "run", f"data.train={data}/train", *SHORT, "train.steps=400")
    assert job.wait() in (1, 2)
    assert "does not belong to shard" in job.output and "Traceback" not in job.output


def test_an_empty_data_folder(launch, wikipedia, tmp_path):
    (tmp_path / "empty").mkdir()
    _fails(launch(LANGUAGE, tmp_path / "run", f"data.train={tmp_path}/empty"), "is empty", "python -m train.prepare")


def test_another_tokenizer(launch, wikipedia, tmp_path):
    data = _copy(wikipedia, tmp_path / "data")
    (data / "tokenizer.model").write_bytes(b"another tokenizer")
    _fails(
        launch(LANGUAGE, tmp_path / "run", f"data.train={data}/train", f"data.validation={data}/validation"),
        "tokenizer",
    )


def test_two_runs_in_one_directory(launch, wikipedia, tmp_path):
    first = launch(LANGUAGE, tmp_path, *SHORT, "train.steps=40000")
    first.wait_for_step(1)
    _fails(launch(LANGUAGE, tmp_path, *SHORT, "train.steps=40000"), "is in use by process", "run.dir")
    before = len(first.metrics())
    first.wait_for_step(before + 2)  # undisturbed


def test_a_taken_port(launch, wikipedia, tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        _fails(launch(LANGUAGE, tmp_path, *SHORT, port=port), f"port {port}", "--master_port")


def test_a_checkpoint_directory_cut_in_half(launch, wikipedia, tmp_path):
    job = launch(LANGUAGE, tmp_path, *SHORT)
    assert job.wait() == 0, job.output
    losses = job.metrics()
    newest = tmp_path / "checkpoints" / "step_00000004"
    for file in sorted(p for p in newest.rglob("*") if p.is_file())[1::2]:
        file.unlink()
    again = launch(LANGUAGE, tmp_path, *SHORT, "train.steps=6")
    assert again.wait() == 0, again.output
    assert "is damaged" in again.output and "continuing after step 2" in again.output
    assert again.metrics()[:2] == losses[:2] and len(again.metrics()) == 6


def test_a_disk_that_fills_up_while_saving(launch, wikipedia, mounted, tmp_path):
    run_dir = tmp_path / "small"
    run_dir.mkdir()
    with mounted(run_dir, "size=200M"):  # room for two checkpoints, not for three
        job = launch(LANGUAGE, run_dir, *SHORT, *LARGE, "checkpoint.every_steps=1", "checkpoint.keep=9")
        _fails(job, "could not be written", "No space left", "it continues after step", code=1)
        assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
        subprocess.run(["mount", "-o", "remount,size=1G", str(run_dir)], check=True)
        again = launch(LANGUAGE, run_dir, *SHORT, *LARGE)
        assert again.wait() == 0, again.output
        assert "continuing after step" in again.output and len(again.metrics()) == 4


def test_a_run_goes_on_while_its_disk_is_full(launch, wikipedia, mounted, filled, tmp_path):
    run_dir = tmp_path / "small"
    run_dir.mkdir()
    with mounted(run_dir, "size=20M"):
        long = ["train.steps=10000", "checkpoint.every_steps=10000", "monitor.every_steps=1"]
        job = launch(LANGUAGE, run_dir, *SHORT, *long, launcher="python")
        job.wait_for_step(2)
        with filled(run_dir):
            for name in ("metrics.jsonl", "log.txt", "events.out.tfevents"):
                job.wait_for_output(f"warning: {run_dir / name}")
        job.wait_for_output("metrics.jsonl can be written again, and nothing is missing from it")
        (run_dir / "stop").touch()
        assert job.wait() == 75, job.output
        assert [line["step"] for line in job.metrics()] == list(range(1, len(job.metrics()) + 1))
        assert job.output.count("metrics.jsonl can't be written (No space left on device)") == 1
        assert "Traceback" not in job.output


def test_a_disk_that_is_full_at_the_start(launch, wikipedia, mounted, filled, tmp_path):
    (tmp_path / "mount").mkdir()
    with mounted(tmp_path / "mount", "size=1M"), filled(tmp_path / "mount"):
        job = launch(LANGUAGE, tmp_path / "mount", *SHORT, launcher="python")
        _fails(job, "run.dir", "can't be written (No space left", "make room")


def test_a_read_only_run_directory(launch, wikipedia, mounted, tmp_path):
    (tmp_path / "mount").mkdir()
    with mounted(tmp_path / "mount", "ro"):
        _fails(launch(LANGUAGE, tmp_path / "mount" / "run", *SHORT), "Read-only file system", "run.dir")


def test_a_corrupt_image(launch, fashion_mnist, tmp_path):
    data = _copy(fashion_mnist / "train", tmp_path / "train")
    for shard in data.glob("*.tar"):  # every image of the set, whatever the order: PNG's first bytes are overwritten
        content = shard.read_bytes()
        shard.write_bytes(content.replace(b"\x89PNG", b"\x00bad"))
    settings = [*SHORT, f"data.train={data}"]
    _fails(launch(VISION, tmp_path / "fail", *settings), "image", ".tar", "on_bad_sample", code=1)
    job = launch(VISION, tmp_path / "skip", *settings, "data.on_bad_sample=skip")
    _fails(job, "all samples of the global batch were skipped", code=1)


def test_a_mistake_on_the_command_line_without_a_launcher(launch, tmp_path):
    _fails(launch("configs/nowhere.yaml", tmp_path, launcher="python"), "configs/nowhere.yaml does not exist")
    _fails(launch(LANGUAGE, tmp_path, "train.steps", launcher="python"), "train.steps", "key=value")
