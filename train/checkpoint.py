"""Checkpoints: a directory for each step, complete or absent.

    RUN/checkpoints/step_00000130/
        engine/            DeepSpeed's own files: weights, optimizer state, loss scale
        rng_00000.pt       random number generators, a file a rank
        model.safetensors  the weights whole, for generate, evaluate and model.init_from
        state.json         step, samples consumed, config, data digest
        checksums.json     sha256 of all of the above
    RUN/checkpoints/latest   names the newest

A save writes everything into `.step_00000130.partial`, flushes it to disk, makes it visible by one rename and moves `latest`
last, so that a crash at any moment leaves the one before intact. DeepSpeed's files are pickles, which can run code when
they are loaded: only files that a checkpoint's own checksums name and match are ever opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from safetensors.torch import save_file

from train import engine as engines
from train.distributed import Ranks
from train.run_directory import checkpoint_name, checkpoint_steps

ENGINE_TAG = "engine"
CHECKSUMS = "checksums.json"


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
    """The checkpoints of one run."""

    def __init__(self, run_dir: str | Path, ranks: Ranks, keep: int) -> None:
        self.directory = Path(run_dir) / "checkpoints"
        self._ranks = ranks
        self._keep = keep

    def save(self, engine: Any, state: State) -> Path:
        """Writes the checkpoint of `state.step`; every rank must call it.

        Raises:
            CheckpointError: on all ranks, when one of them can't write (disk full, quota, read-only mount).
        """
        final = self.directory / checkpoint_name(state.step)
        partial = self.directory / f".{final.name}.partial"
        try:
            self._write(engine, state, partial)
            with self._writing():
                if self._ranks.is_main:
                    self._publish(partial, final)
        except ValueError as error:
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            self._ranks.barrier()
            newest = self.steps()[-1:]
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written in {self.directory} ({error}). Make room or make "
                "it writable, then start the same command again: it continues "
                + (f"after step {newest[0]}" if newest else "from the beginning")
            ) from None
        return final

    def _write(self, engine: Any, state: State, partial: Path) -> None:
        with self._writing():
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / ENGINE_TAG).mkdir(parents=True)
        with self._writing():
            writer = engine.checkpoint_engine = _PatientWriter()
            # The one file that DeepSpeed does not give to its writer: a script, useless beside model.safetensors.
            engine._copy_recovery_script = lambda path: None
            engine.save_checkpoint(str(partial), tag=ENGINE_TAG, save_latest=False)
            writer.raise_error()
            torch.save(_random_state(), partial / f"rng_{self._ranks.rank:05d}.pt")
        weights = engines.full_state_dict(engine, self._ranks.is_main)
        with self._writing():
            if self._ranks.is_main:
                save_file(weights, partial / "model.safetensors")
                (partial / "state.json").write_text(json.dumps(state.__dict__, indent=1))
        with self._writing():
            mine = self._my_checksums(partial, flush=True)
        checksums = self._merge(mine)
        with self._writing():
            if self._ranks.is_main:
                _write_flushed(partial / CHECKSUMS, json.dumps(checksums, indent=1))

    def _writing(self) -> AbstractContextManager[None]:
        """An error of writing on any rank is raised as ValueError on all. torch reports a full disk as RuntimeError."""
        return self._ranks.fail_together(OSError, RuntimeError, SafetensorError)

    def _publish(self, partial: Path, final: Path) -> None:
        if final.exists():  # saved before, but left behind by a fallback to an older one
            shutil.rmtree(final)
        os.rename(partial, final)
        _write_flushed(self.directory / ".latest.partial", final.name)
        os.rename(self.directory / ".latest.partial", self.directory / "latest")
        _flush(self.directory)
        for step in self.steps()[: -self._keep]:
            shutil.rmtree(self.directory / checkpoint_name(step))

    def load_newest(self, engine: Any, world_size: int) -> State | None:
        """Restores the newest intact checkpoint and returns its state; None where the run has none.

        A damaged one is reported, set aside under a name that starts with `damaged_`, and the one before it is tried.

        Raises:
            ValueError: all are damaged, or the newest was written by another number of ranks.
        """
        steps = self.steps()
        if not steps:
            return None
        for step in reversed(steps):
            checkpoint = self.directory / checkpoint_name(step)
            problem = self._problem(checkpoint)
            if problem is None:
                return self._restore(engine, checkpoint, world_size)
            self._set_aside(checkpoint, problem)
        raise ValueError(
            f"no checkpoint in {self.directory} is intact; what is left of them was renamed to damaged_*. "
            "Start the same command again to train from the beginning, or give another run.dir"
        )

    def _restore(self, engine: Any, checkpoint: Path, world_size: int) -> State:
        state = State.read(checkpoint)
        if state.world_size != world_size:
            raise ValueError(
                f"{checkpoint} was written by {state.world_size} ranks and this job has {world_size}: "
                f"start it with {state.world_size}, or start a new run with model.init_from={checkpoint.parent.parent}"
            )
        if state.zero_stage != engine.zero_optimization_stage():
            raise ValueError(
                f"{checkpoint} was written at ZeRO stage {state.zero_stage} and deepspeed.config asks for "
                f"{engine.zero_optimization_stage()}: use the stage it was written at"
            )
        loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE_TAG)
        assert loaded is not None, f"DeepSpeed found nothing to load in {checkpoint}"
        _set_random_state(torch.load(checkpoint / f"rng_{self._ranks.rank:05d}.pt", weights_only=True))
        return state

    def _problem(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint's files, found by all ranks together; None if all match their checksums."""
        try:
            expected = json.loads((checkpoint / CHECKSUMS).read_text())
        except (OSError, ValueError):
            return f"{CHECKSUMS} is missing or unreadable"
        missing = [name for name in expected if not (checkpoint / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        actual = self._merge(self._my_checksums(checkpoint, flush=False))
        wrong = [name for name in sorted(expected | actual) if actual.get(name) != expected.get(name)]
        return f"{wrong[0]} does not match its checksum" if wrong else None

    def _set_aside(self, checkpoint: Path, problem: str) -> None:
        if self._ranks.is_main:
            aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
            print(
                f"warning: {checkpoint} is damaged ({problem}); kept as {aside.name}, trying the one before", flush=True
            )
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)
        self._ranks.barrier()

    def _my_checksums(self, directory: Path, flush: bool) -> dict[str, str]:
        """sha256 of this rank's share of the files below `directory`, which it can force to the disk meanwhile."""
        files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != CHECKSUMS)
        mine = files[self._ranks.rank :: self._ranks.world_size]
        return {str(path.relative_to(directory)): _sha256(path, flush) for path in mine}

    def _merge(self, mine: dict[str, str]) -> dict[str, str]:
        return {name: digest for part in self._ranks.gather(mine) for name, digest in part.items()}

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return checkpoint_steps(self.directory)

    def remove_partial(self) -> None:
        """Clears what a killed save has left. Only for the main rank, with the run locked."""
        for partial in self.directory.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sha256(path: Path, flush: bool) -> str:
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


class _PatientWriter(TorchCheckpointEngine):
    """DeepSpeed's writer, except that an error waits until `raise_error`.

    Raised in the middle of `save_checkpoint` it would leave the other ranks waiting in a barrier.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self._error: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self._error = self._error or error

    def raise_error(self) -> None:
        if self._error:
            raise self._error
