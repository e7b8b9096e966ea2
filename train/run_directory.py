"""One run's directory: who may write into it, and what says where the run stands."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# Exit codes of `python -m train`, also in docs/operations.md.
EXIT_FINISHED = 0  # trained to the end, or to train.stop_at_step
EXIT_ERROR = 1  # something failed while training
EXIT_USAGE = 2  # the config, the data or the directory can't be used as asked
EXIT_STOPPED = 75  # a signal asked to stop and it saved: start the same command again


@contextmanager
def needed(path: Path, key: str = "") -> Iterator[None]:
    """Around writing what a run can't start without.

    Raises:
        ValueError: in place of an OSError; it names `path` after `key`.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{key}{path} can't be written ({error.strerror}): make room or make it writable, or give another run.dir"
        ) from None


class RunDirectory:
    """Created and locked by the main rank, for as long as its process lives."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.stop_file = self.path / "stop"  # asks the run to save and exit
        self.heartbeat = self.path / ".heartbeat"  # its modification time is when the next one is due
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Creates the directory and takes its lock.

        Raises:
            ValueError: it can't be written, or another run has it.
        """
        with needed(self.path, "run.dir="):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")
        try:
            # The kernel drops the lock with the process, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ValueError(f"run.dir={self.path} is in use by {owner}: stop it, or give another run.dir") from None
        with needed(self.path, "run.dir="):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        self._lock = lock

    def write_status(self, state: str, **details: object) -> None:
        """Replaces `status.json`: state is running, finished, stopped or failed.

        `restarts`, the supervisor's restarts over the whole life of the run, is carried over.
        """
        status = {
            "state": state,
            "time": _now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "restarts": self.read_status().get("restarts", 0),
            **details,
        }
        partial = self.path / ".status.partial"
        partial.write_text(json.dumps(status) + "\n")
        os.replace(partial, self.path / "status.json")

    def read_status(self) -> dict[str, Any]:
        """What `status.json` holds; empty where there is none that can be read."""
        try:
            status: dict[str, Any] = json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return status

    def ask_to_stop(self, reason: str) -> None:
        """Makes the run save and exit after the step it is in."""
        partial = self.path / ".stop.partial"
        partial.write_text(reason)
        os.replace(partial, self.stop_file)

    def log(self, line: str) -> None:
        """Adds a line with its time to `log.txt`."""
        with open(self.path / "log.txt", "a") as file:
            file.write(f"{_now()} {line}\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def checkpoint_steps(directory: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in directory.glob("step_*") if p.is_dir())


def newest_checkpoint(run_dir: str | Path) -> Path:
    """The newest checkpoint of a run, for the commands that use its weights.

    Raises:
        ValueError: there is none.
    """
    directory = Path(run_dir) / "checkpoints"
    steps = checkpoint_steps(directory)
    if not steps:
        raise ValueError(f"{run_dir} holds no checkpoint: train it first, or give the directory of another run")
    return directory / checkpoint_name(steps[-1])


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"
