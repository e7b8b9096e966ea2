"""Batches for a training run: the data order, the shards and the decoders joined by torch's DataLoader.

Worker k of K makes the micro-batches j = k (mod K); DataLoader takes from its workers in turn, so the order is that of
j with any number of workers. Everything is a function of the sample number: there is no loader state to save.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from train.config import AnyConfig, DataConfig, LanguageConfig, VisionConfig
from train.data.batches import BadSampleError, Batch, MakeBatch
from train.data.images import ImageBatches, crop_flip, no_augmentation, rand_augment
from train.data.manifest import ImageManifest, Manifest, TextManifest
from train.data.order import (
    DataOrder,
    check_world_size,
    data_parallel_size,
    micro_batch_size,
    rank_numbers,
    validation_numbers,
)
from train.data.shards import ShardReader
from train.data.storage import check_address, fetch, file_sha256, is_remote, join, local_path
from train.data.text import TextBatches

_PREFETCH = 4  # micro-batches a worker makes ahead
_PARENT_SECONDS = 5  # between a worker's looks for its parent


class MicroBatches(IterableDataset):
    """Batch j = `make(j)` for j = 0, 1, ..., dealt to the loader's workers in turn; `count` None means without end."""

    def __init__(self, make: Callable[[int], Batch], count: int | None):
        self._make = make
        self._count = count

    def __iter__(self) -> Iterator[Batch | BadSampleError]:
        worker = get_worker_info()
        j, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while self._count is None or j < self._count:
            try:
                yield self._make(j)
            except BadSampleError as error:  # handed over as it is: raised here it would arrive wrapped in a traceback
                yield error
            j += stride


def _end_only_for_parent(parent: int, worker_id: int) -> None:
    """Runs in a loader's worker: of the signals that ask a process to end, it obeys those of the main process, `parent`.

    A launcher, scheduler or Ctrl-C signals every process of a job, but the main process needs its workers until it has
    saved. It ends them itself. Should it be killed, that is noticed here: torch's own watchdog asks a worker that has
    just started who its parent is, which is too late if that has died meanwhile.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        received = None
        while os.getppid() == parent and (received is None or received.si_pid != parent):
            received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_SECONDS)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _loader(batches: MicroBatches, workers: int) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_end_only_for_parent, os.getpid()),
        multiprocessing_context="fork" if workers else None,  # workers take over the opened data sets as they are
    )


def train_loader(
    config: AnyConfig, order: DataOrder, make_batch: MakeBatch, first_n: int, rank: int, size: int, micro: int
) -> DataLoader:
    """Micro-batches of data-parallel rank `rank` of `size` from sample number `first_n` on, without end.

    Items as of `MicroBatches`, each of `micro` samples.
    """
    repeats = config.data.repeats if isinstance(config, VisionConfig) else 1

    def make(j: int) -> Batch:
        numbers = rank_numbers(first_n + j * micro * size, rank, size, micro)
        return make_batch(numbers, order.sample_ids(numbers // repeats), np.ones(micro, dtype=np.float32))

    return _loader(MicroBatches(make, count=None), config.data.workers)


def validation_loader(
    config: AnyConfig, samples: int, make_batch: MakeBatch, rank: int, size: int, micro: int
) -> DataLoader:
    """One pass over `samples` samples in natural order; as many micro-batches on every rank, padding weighs 0."""
    numbers = validation_numbers(samples, rank, size, micro)

    def make(j: int) -> Batch:
        ids = np.minimum(numbers[j], samples - 1)  # padding shows the last sample
        return make_batch(numbers[j], ids, (numbers[j] < samples).astype(np.float32))

    return _loader(MicroBatches(make, count=len(numbers)), config.data.workers)


@dataclass
class Data:
    """The two data sets of a run as one rank sees them; `tokenizer_path` and `bos_id` are None for images."""

    train_manifest: TextManifest | ImageManifest
    validation_manifest: TextManifest | ImageManifest
    order: DataOrder
    tokenizer_path: Path | None
    bos_id: int | None
    _train_loader: Callable[[int], DataLoader]
    _validation_loader: DataLoader

    @property
    def digest(self) -> str:
        """Changes when either data set does: a run resumed with another digest would see other data."""
        return f"{self.train_manifest.digest} {self.validation_manifest.digest}"

    def train_batches(self, first_n: int) -> Iterator[Batch]:
        """Endless micro-batches, starting at global sample number `first_n`.

        Raises (while iterating):
            BadSampleError: a sample can't be used and data.on_bad_sample is fail.
        """
        return _raising(self._train_loader(first_n))

    def validation_batches(self) -> Iterator[Batch]:
        """One pass over the validation set; the loader's workers stay for the next pass."""
        return _raising(self._validation_loader)


def _raising(loader: DataLoader) -> Iterator[Batch]:
    for batch in _started(loader):
        if isinstance(batch, BadSampleError):
            raise batch
        yield batch


def _started(loader: DataLoader) -> Iterator[Batch | BadSampleError]:
    """`iter(loader)`, whose workers inherit blocked signals: none can end them before `_end_only_for_parent` decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def build_data(config: AnyConfig, rank: int, world_size: int) -> Data:
    """Opens the data sets of `config` for one rank, after checking that they fit the model and the number of ranks.

    Ranks that share rows (`train.sequence_parallel_size`) get the same batches, of whole rows.

    Raises:
        ValueError: a data set is missing, damaged or of the wrong kind, a setting does not fit it or the number of
            ranks; the message names the key, its value and what is allowed.
        OSError: a remote data set can't be read.
    """
    check_world_size(config, world_size)
    train = _open_manifest("train", config.data.train, config)
    validation = _open_manifest("validation", config.data.validation, config)
    order = DataOrder(
        [shard.samples for shard in train.shards], config.data.lanes, config.data.shuffle_block, config.train.seed
    )
    tokenizer_path = None
    if isinstance(train, TextManifest) and isinstance(validation, TextManifest):
        if validation.tokenizer_sha256 != train.tokenizer_sha256:
            raise ValueError(
                f"data.validation={config.data.validation} was made with another tokenizer than "
                f"data.train={config.data.train}; prepare both together"
            )
        tokenizer_path = _tokenizer(config.data, train)
    make_train = _batch_maker(config, config.data.train, train, augmented=True)
    make_validation = _batch_maker(config, config.data.validation, validation, augmented=False)
    # Its place in the data order.
    place = rank // config.train.sequence_parallel_size, data_parallel_size(config, world_size)
    micro = micro_batch_size(config, world_size)
    return Data(
        train_manifest=train,
        validation_manifest=validation,
        order=order,
        tokenizer_path=tokenizer_path,
        bos_id=train.bos_id if isinstance(train, TextManifest) else None,
        _train_loader=lambda first_n: train_loader(config, order, make_train, first_n, *place, micro),
        _validation_loader=validation_loader(config, validation.samples, make_validation, *place, micro),
    )


def _open_manifest(key: str, address: str, config: AnyConfig) -> TextManifest | ImageManifest:
    """The manifest at data.`key`, checked against the model's settings."""
    try:
        check_address(address, config.data.cache_dir, config.data.allow_pipe)
        manifest = Manifest.load(address)
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from None
    wanted: type[Manifest] = TextManifest if isinstance(config, LanguageConfig) else ImageManifest
    if not isinstance(manifest, wanted):
        raise ValueError(f"data.{key}={address} holds {manifest.kind}, but task {config.task} needs {wanted.kind}")
    if isinstance(config, LanguageConfig):
        assert isinstance(manifest, TextManifest)
        _check_equal("model.vocab_size", config.model.vocab_size, f"data.{key}={address} has", manifest.vocab_size)
        rows = f"data.{key}={address} has rows of"
        _check_equal("model.sequence_length", config.model.sequence_length, rows, manifest.row_length)
    else:
        assert isinstance(manifest, ImageManifest)
        _check_equal("model.classes", config.model.classes, f"data.{key}={address} has", manifest.classes)
    return manifest


def _check_equal(key: str, value: int, where: str, found: int) -> None:
    if value != found:
        raise ValueError(f"{key} is {value}, but {where} {found}; they must be equal")


def _tokenizer(data: DataConfig, manifest: TextManifest) -> Path:
    """A local path of the tokenizer of the training set."""
    address = join(data.train, manifest.tokenizer)
    if is_remote(address):
        assert data.cache_dir is not None
        return fetch(address, Path(data.cache_dir), manifest.tokenizer_sha256, ".model")
    path = local_path(address)
    if not path.is_file() or file_sha256(path) != manifest.tokenizer_sha256:
        raise ValueError(
            f"data.train={data.train} was made with the tokenizer {path}, which is missing or another one now; put it "
            "back or prepare the data set again"
        )
    return path


def _batch_maker(config: AnyConfig, address: str, manifest: TextManifest | ImageManifest, augmented: bool) -> MakeBatch:
    data = config.data
    reader = ShardReader(address, manifest, data.cache_dir, data.allow_pipe)
    skip_bad = data.on_bad_sample == "skip"
    if isinstance(manifest, TextManifest):
        return TextBatches(reader, manifest, skip_bad)
    assert isinstance(config, VisionConfig)
    size, mean, std = config.model.image_size, config.data.mean, config.data.std
    augment = no_augmentation(size)
    if augmented and config.data.augmentation == "crop_flip":
        augment = crop_flip(size, config.data.crop_padding)
    elif augmented and config.data.augmentation == "rand_augment":
        if config.model.channels != 3:
            raise ValueError(f"data.augmentation=rand_augment needs model.channels 3, not {config.model.channels}")
        augment = rand_augment(size, mean, std, config.data.random_erasing)
    return ImageBatches(reader, manifest.classes, size, augment, mean, std, config.train.seed, skip_bad)
