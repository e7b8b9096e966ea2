import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from train.config import to_yaml
from train.data.batches import BadSampleError
from train.data.loader import build_data

CONFIGS = ["language_config", "vision_config"]


def batches_of(config, rank=0, world_size=1, first_n=0, count=11) -> list[dict[str, torch.Tensor]]:
    return list(islice(build_data(config, rank, world_size).train_batches(first_n), count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def ids_of(batches) -> list[int]:
    return torch.cat([batch["sample_ids"] for batch in batches]).tolist()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_number_of_workers_gives_the_same_batches(name, workers, request):
    config = request.getfixturevalue(name)
    config.train.micro_batch_size = 4
    expected = batches_of(config)
    expected_validation = list(build_data(config, 0, 1).validation_batches())
    config.data.workers = workers
    assert_equal(batches_of(config), expected)
    data = build_data(config, 0, 1)
    for _ in range(2):  # a second pass, by the same workers
        assert_equal(list(data.validation_batches()), expected_validation)


def test_ranks_that_share_rows_get_the_same_batches(language_config):
    pairs = [build_data(language_config, rank, 2) for rank in (0, 1)]
    language_config.train.sequence_parallel_size = 3
    for rank in range(6):
        data, expected = build_data(language_config, rank, 6), pairs[rank // 3]
        assert_equal(*(list(islice(each.train_batches(first_n=12), 5)) for each in (data, expected)))
        assert_equal(list(data.validation_batches()), list(expected.validation_batches()))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_batches_from_n_on_are_those_of_an_uninterrupted_run(name, workers, request):
    config = request.getfixturevalue(name)
    config.data.workers = workers
    if name == "vision_config":
        config.data.augmentation = "crop_flip"
    whole = batches_of(config, count=40)  # several epochs
    for step in (1, 7, 33):
        assert_equal(batches_of(config, first_n=12 * step, count=40 - step), whole[step:])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batches_of_one_rank(language_config, world_size):
    whole = batches_of(language_config, count=6)
    language_config.train.micro_batch_size = 1
    per_rank = [
        ids_of(batches_of(language_config, rank, world_size, count=6 * 12 // world_size)) for rank in range(world_size)
    ]
    together = np.array(per_rank).reshape(world_size, 6, 12 // world_size)
    for step, batch in enumerate(whole):
        # rank r holds the numbers r, r + W, ... of the batch
        assert together[:, step].T.ravel().tolist() == batch["sample_ids"].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_weighs_every_sample_once(vision_config, world_size):
    vision_config.train.micro_batch_size = 2
    ranks = [list(build_data(vision_config, rank, world_size).validation_batches()) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    weighed: dict[int, float] = {}
    for batch in [batch for batches in ranks for batch in batches]:
        for sample_id, weight in zip(batch["sample_ids"].tolist(), batch["weights"].tolist(), strict=True):
            weighed[sample_id] = weighed.get(sample_id, 0) + weight
    assert weighed == {sample_id: 1 for sample_id in range(23)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_reaches_the_trainer_as_it_is(vision_config, workers, monkeypatch):
    vision_config.data.workers = workers

    def refuse(self, sample_id):
        raise BadSampleError("image 5 is bad")

    monkeypatch.setattr("train.data.images.ImageBatches._decode", refuse)
    with pytest.raises(BadSampleError, match=r"^image 5 is bad \(data.on_bad_sample=skip would go on without it\)$"):
        batches_of(vision_config)


def test_text_data_has_a_tokenizer(language_config, text_data):
    data = build_data(language_config, 0, 1)
    assert data.tokenizer_path is not None and data.tokenizer_path.samefile(text_data / "tokenizer.model")
    assert data.bos_id == 1


def set_value(config, key, value):
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("language_config", "model.vocab_size", 301, r"model.vocab_size is 301, but data.train=.* has 300"),
        ("language_config", "model.sequence_length", 8, r"model.sequence_length is 8, but .* has rows of 16"),
        ("vision_config", "model.classes", 7, r"model.classes is 7, but data.train=.* has 5"),
        ("vision_config", "data.augmentation", "rand_augment", r"rand_augment needs model.channels 3, not 1"),
        ("language_config", "data.lanes", 999, r"data.lanes is 999; .* 2"),
        ("language_config", "data.lanes", 10_000, r"data.lanes is 10000, but the data set has only \d+ samples"),
        ("language_config", "data.validation", "nowhere", r"data.validation: data folder nowhere does not exist"),
        ("language_config", "data.train", "pipe:cat x", r"data.train: .*allow_pipe"),
        ("language_config", "data.train", "http://127.0.0.1:1", r"data.train: .*cache_dir"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_build_names_the_key_that_does_not_fit(name, key, value, message, request):
    config = request.getfixturevalue(name)
    set_value(config, key, value)
    with pytest.raises(ValueError, match=message):
        build_data(config, 0, 2)


def test_the_kind_of_data_must_match_the_task(language_config, image_data):
    language_config.data.train = str(image_data / "train")
    with pytest.raises(ValueError, match=r"data.train=.* holds images, but task language needs text"):
        build_data(language_config, 0, 1)


def test_validation_made_with_another_tokenizer_is_refused(language_config, text_data, tmp_path):
    content = (text_data / "validation" / "manifest.json").read_text()
    other = tmp_path / "validation"
    other.symlink_to(text_data / "validation")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in other.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "manifest.json").unlink()
    start = content.index('"tokenizer_sha256": "') + len('"tokenizer_sha256": "')
    (copy / "manifest.json").write_text(content[:start] + "0" * 64 + content[start + 64 :])
    language_config.data.validation = str(copy)
    with pytest.raises(ValueError, match=r"data.validation=.* another tokenizer than data.train="):
        build_data(language_config, 0, 1)


# A trainer in its own process: prints the ids of its workers, then does what `end` says.
TRAINER = """
import multiprocessing, os, signal, sys, time
from omegaconf import OmegaConf
from train.config import VisionConfig
from train.data.loader import build_data

config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(VisionConfig), OmegaConf.load(sys.argv[1])))
data = build_data(config, 0, 1)
"""
BEGIN = """
batches = data.train_batches(0)
next(batches)
next(data.validation_batches())
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""


def start_trainer(config, tmp_path: Path, end: str, begin: str = BEGIN) -> tuple[subprocess.Popen, list[int]]:
    config.run.dir, config.optimizer.lr, config.train.steps, config.checkpoint.every_steps = "x", 1.0, 1, 1
    for key in ("patch_size", "layers", "width", "heads"):
        setattr(config.model, key, 1)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER + begin + end, str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert trainer.stdout is not None
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 4
    return trainer, workers


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], seconds: float = 30) -> list[int]:
    """The processes that are still there after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_workers_end_with_a_killed_trainer(vision_config, tmp_path):
    vision_config.data.workers = 2
    trainer, workers = start_trainer(vision_config, tmp_path, "time.sleep(600)")
    trainer.kill()
    trainer.wait()
    assert wait_until_gone(workers) == []


# Workers but the first begin seconds later, as on a busy machine.
LATE = """
from torch.utils.data._utils import worker
loop = worker._worker_loop
worker._worker_loop = lambda *arguments: (time.sleep(arguments[10]), loop(*arguments))  # the worker's number
"""


def test_workers_end_with_a_trainer_that_is_killed_before_they_begin(vision_config, tmp_path):
    vision_config.data.workers = 2
    trainer, workers = start_trainer(vision_config, tmp_path, "time.sleep(600)", begin=LATE + BEGIN)
    trainer.kill()
    trainer.wait()
    assert wait_until_gone(workers) == []


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_signals_to_the_group_while_the_trainer_goes_on(vision_config, tmp_path, signal_number):
    vision_config.data.workers = 2
    go_on = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    use = "[next(batches) for _ in range(50)]; print('went on', flush=True)\n"
    end = go_on + "print('ready', flush=True); time.sleep(2)\n" + use
    trainer, workers = start_trainer(vision_config, tmp_path, end, begin=LATE + BEGIN)
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
    os.killpg(trainer.pid, signal_number)
    assert trainer.stdout.readline() == "went on\n"
    assert trainer.wait(timeout=60) == 0
    assert wait_until_gone(workers) == []


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise RuntimeError"], ids=["end", "exit", "error"])
def test_a_trainer_that_exits_with_batches_under_way_does_not_hang(vision_config, tmp_path, end):
    vision_config.data.workers = 2
    trainer, workers = start_trainer(vision_config, tmp_path, end)
    trainer.wait(timeout=60)
    assert wait_until_gone(workers) == []
