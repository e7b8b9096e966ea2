"""Checkpoints: a directory for each step, complete or absent.

    RUN/checkpoints/step_00000130/
        state_00000.safetensors   a rank's part of weights and optimizer state, and its random number generators
        model.safetensors         the weights whole, for generate, evaluate and model.init_from
        state.json                step, samples consumed, config, data digest
        checksums.json            sha256 of all of the above
    RUN/checkpoints/latest   names the newest

A save writes everything into `.step_00000130.partial`, flushes it to disk, makes it visible by one rename and moves `latest`
last, so that a crash at any moment leaves the one before intact. In the background, only copying the state to the host's
memory holds up training: files are written by a thread, and the ranks publish them together between two later steps.
No file is a pickle, and only those that a checkpoint's own checksums name and match are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from train import engine as engines
from train import training_state, zero
from train.distributed import Ranks
from train.run_directory import checkpoint_name, checkpoint_steps

CHECKSUMS = "checksums.json"
WRITE_ERRORS = (OSError, SafetensorError)
Checksums = dict[str, str]  # sha256 by file name


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; what was there before is intact."""


@dataclass(frozen=True)
class State:
    """What `state.json` holds: all that a run needs to go on, beside the engine's files."""

    step: int
    samples: int  # n of the data order
    world_size: int
    zero_stage: int
    config: dict[str, Any]  # flat, dotted keys
    data_digest: str

    @classmethod
    def read(cls, checkpoint: Path) -> State:
        return cls(**json.loads((checkpoint / "state.json").read_text()))


class Checkpoints:
    """The checkpoints of one run. `in_background` writes them while training goes on, one at a time."""

    def __init__(self, run_dir: str | Path, ranks: Ranks, keep: int, in_background: bool = False) -> None:
        self.directory = Path(run_dir) / "checkpoints"
        self._ranks = ranks
        self._keep = keep
        self._in_background = in_background
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: tuple[int, Future[Checksums]] | None = None  # step and files of the save under way
        self._copies: dict[str, Tensor] = {}  # on the host; kept, since fresh memory is slow to fill

    def save(self, engine: Any, state: State) -> None:
        """Starts to save `state.step`, after waiting for the save before it; every rank must call it, and later `finish`.

        In the background the engine may train on at once, otherwise only after `finish`.

        Raises:
            CheckpointError: on all ranks, when one of them can't write this or the one before (disk full, read-only mount).
        """
        self.finish()
        partial = self._partial(state.step)
        with self._errors(state.step):
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            tensors, header = training_state.collect(engine)
        weights = engines.full_state_dict(engine, self._ranks.is_main)
        if self._in_background and zero.swap_folder(engine) is None:  # from there they are copies already
            tensors = self._copy(tensors)
        files = {training_state.file_name(self._ranks.rank): (tensors, header)}
        texts = {}
        if self._ranks.is_main:
            files["model.safetensors"] = weights, {}
            texts["state.json"] = json.dumps(state.__dict__, indent=1)
        self._pending = state.step, self._thread.submit(_write, partial, files, texts)

    def is_written(self) -> bool:
        """Whether this rank has written its files of the save under way, or could not: time to `finish`."""
        return self._pending is not None and self._pending[1].done()

    def finish(self) -> Path | None:
        """Waits for the save under way and makes it visible; None where there is none. Every rank must call it.

        Raises:
            CheckpointError: as `save` does.
        """
        if self._pending is None:
            return None
        (step, writing), self._pending = self._pending, None
        partial, final = self._partial(step), self.directory / checkpoint_name(step)
        with self._errors(step):
            mine = writing.result()
        checksums = self._merge(mine)
        with self._errors(step):
            if self._ranks.is_main:
                _write_flushed(partial / CHECKSUMS, json.dumps(checksums, indent=1))
                self._publish(partial, final)
        return final

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the host's memory, safe from the next step."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor)
        return self._copies

    @contextmanager
    def _errors(self, step: int) -> Iterator[None]:
        """An error of writing on any rank becomes CheckpointError on all; what there is of the checkpoint is removed."""
        try:
            with self._ranks.fail_together(*WRITE_ERRORS):
                yield
        except ValueError as error:
            if self._ranks.is_main:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            newest = self.steps()[-1:]
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written in {self.directory} ({error}). Make room or make "
                "it writable, then start the same command again: it continues "
                + (f"after step {newest[0]}" if newest else "from the beginning")
            ) from None

    def _partial(self, step: int) -> Path:
        return self.directory / f".{checkpoint_name(step)}.partial"

    def _publish(self, partial: Path, final: Path) -> None:
        if final.exists():  # saved before, but left behind by a fallback to an older one
            shutil.rmtree(final)
        os.rename(partial, final)
        _write_flushed(self.directory / ".latest.partial", final.name)
        os.rename(self.directory / ".latest.partial", self.directory / "latest")
        _flush(self.directory)
        for step in checkpoint_steps(self.directory)[: -self._keep]:
            shutil.rmtree(self.directory / checkpoint_name(step))

    def load_newest(self, engine: Any) -> State | None:
        """Restores the newest intact checkpoint, whatever ranks and stage wrote it; None where the run has none.

        A damaged one is reported, set aside under a name that starts with `damaged_`, and the one before it is tried.

        Raises:
            ValueError: all are damaged, or the newest intact one is of another model.
        """
        steps = self.steps()
        if not steps:
            return None
        for step in reversed(steps):
            checkpoint = self.directory / checkpoint_name(step)
            problem = self._problem(checkpoint)
            if problem is None:
                state = State.read(checkpoint)
                with self._ranks.fail_together():
                    training_state.restore(engine, checkpoint, state.world_size)
                zero.refresh_weights(engine)
                return state
            self._set_aside(checkpoint, problem)
        raise ValueError(
            f"no checkpoint in {self.directory} is intact; what is left of them was renamed to damaged_*. "
            "Start the same command again to train from the beginning, or give another run.dir"
        )

    def _problem(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint's files, found by all ranks together; None if all match their checksums."""
        expected, names, problem = self._ranks.broadcast(_listing(checkpoint) if self._ranks.is_main else None)
        if problem:
            return problem
        with self._ranks.fail_together():
            mine = {name: _sha256(checkpoint / name) for name in names[self._ranks.rank :: self._ranks.world_size]}
        actual = self._merge(mine)
        wrong = [name for name in names if actual[name] != expected.get(name)]
        return f"{wrong[0]} does not match its checksum" if wrong else None

    def _set_aside(self, checkpoint: Path, problem: str) -> None:
        with self._ranks.fail_together():
            if self._ranks.is_main:
                aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
                print(
                    f"warning: {checkpoint} is damaged ({problem}); kept as {aside.name}, trying the one before",
                    flush=True,
                )
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(checkpoint, aside)

    def _merge(self, mine: Checksums) -> Checksums:
        return {name: digest for part in self._ranks.gather(mine) for name, digest in part.items()}

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, as rank 0 sees them; every rank must call it.

        Ranks that each looked for themselves could see what rank 0 does next, and go separate ways.
        """
        return self._ranks.broadcast(checkpoint_steps(self.directory) if self._ranks.is_main else None)

    def remove_partial(self) -> None:
        """Clears what a killed save has left. Only for the main rank, with the run locked."""
        for partial in self.directory.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _write(
    directory: Path, files: dict[str, tuple[dict[str, Tensor], dict[str, str]]], texts: dict[str, str]
) -> Checksums:
    """Writes a rank's files of a checkpoint, flushes them to disk and returns the sha256 of each."""
    for name, text in texts.items():
        (directory / name).write_text(text)
    for name, (tensors, header) in files.items():
        save_file(tensors, directory / name, header)
    return {name: _sha256(directory / name, flush=True) for name in (*texts, *files)}


def _listing(checkpoint: Path) -> tuple[Checksums, list[str], str | None]:
    """What files there should be, which there are, and what is wrong already with these two."""
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return {}, [], f"{CHECKSUMS} is missing or unreadable"
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file() and path.name != CHECKSUMS)
    missing = sorted(expected.keys() - names)
    return expected, names, f"{missing[0]} is missing" if missing else None


def _sha256(path: Path, flush: bool = False) -> str:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
