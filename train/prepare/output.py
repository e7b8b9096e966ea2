"""Writing a data set: beside its final place until it is complete, shard by shard so that it can be resumed."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from train.data.manifest import Shard
from train.data.order import Int64Array
from train.data.storage import file_sha256

_SETTINGS = "prepare.json"
_LOCK = ".lock"
_SHARD_BYTES = 64 << 20
_LEAST_SHARDS = 16  # of a data set that could do with fewer: their order is what is shuffled first

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Output:
    """The folder that a preparation fills: `work` while it is made, renamed to `out` at the end.

    Args:
        out: where the data set shall be.
        settings: all that decides its content; JSON. Work that was begun with the same settings is continued.

    Raises:
        ValueError: there is something else at `out`, or another process prepares it.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self._out = out
        self._settings = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        self.work = out.with_name(out.name + ".partial")
        self.complete = self._has_settings(out)
        if self.complete:
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} holds something else or other settings; remove it or name another folder")
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.work / _LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it with the process
        except OSError:
            raise ValueError(f"--out {out} is being prepared by another process: wait for its end") from None
        if not self._has_settings(self.work):
            self._discard([entry for entry in self.work.iterdir() if entry.name != _LOCK])
        (self.work / _SETTINGS).write_text(self._settings)

    def _discard(self, entries: list[Path]) -> None:
        if entries:
            print(f"{self.work} was begun with other settings: starting again")
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def finish(self) -> None:
        """Makes the data set visible, complete, under its name."""
        os.rename(self.work, self._out)
        (self._out / _LOCK).unlink()

    def _has_settings(self, folder: Path) -> bool:
        path = folder / _SETTINGS
        return path.is_file() and path.read_text() == self._settings


def samples_per_shard(samples: int, sample_bytes: float) -> int:
    """A default: shards of at most 64 MiB, and several of them even for a small data set."""
    return max(1, min(int(_SHARD_BYTES / sample_bytes), -(-samples // _LEAST_SHARDS)))


def write_shard(path: Path, samples: Iterable[dict[str, Any]], scan: Callable[[Path], Int64Array]) -> Shard:
    """Writes a tar of `samples` and its index unless they are there, and describes them. Same samples, same bytes.

    Args:
        samples: as webdataset's TarWriter takes them: `__key__`, and bytes by extension.
        scan: makes the index from the tar.
    """
    index_path = path.with_suffix(".idx")
    if not path.exists():
        from webdataset import TarWriter  # imported late: it brings torch

        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for sample in samples:
                tar.write(sample)
        buffer = io.BytesIO()
        np.save(buffer, scan(partial))
        index_path.write_bytes(buffer.getvalue())
        os.replace(partial, path)  # last: a shard that exists is complete
    return Shard(
        name=path.name,
        samples=len(np.load(index_path, mmap_mode="r")),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        index_sha256=file_sha256(index_path),
    )


def parallel_map(function: Callable[[_Item], _Result], items: Iterable[_Item], processes: int) -> Iterator[_Result]:
    """Results in the order of `items`, which are read no further ahead than the processes need."""
    # Forked processes start at once and share what is already imported; nothing here runs threads before.
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=_end_with_parent) as pool:
        pending: deque[Future[_Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _end_with_parent() -> None:
    """Ends this process when its parent is killed, which would leave it waiting for work for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
