"""Config → data, model, engine → trained: the run from its first check to its last checkpoint, top to bottom."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import torch

from train import distributed, nvme, sequence_parallel
from train.agreement import check_agreement
from train.checkpoint import Checkpoints, State
from train.config import AnyConfig, to_yaml
from train.data.loader import build_data
from train.data.order import check_world_size
from train.distributed import Ranks
from train.engine import build_engine, build_model, is_partitioned, parameter_count, writable, zero_settings
from train.loop import Outcome, Trainer, TrainingError
from train.monitor import Monitor, show
from train.precision import resolve_precision
from train.resume import check_same_run
from train.run_directory import (
    EXIT_ERROR,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_USAGE,
    RunDirectory,
    checkpoint_steps,
    needed,
    newest_checkpoint,
)
from train.signals import StopRequest
from train.tasks import Task, build_task
from train.watchdog import Watchdog
from train.weights import copy_weights, find_weights


def run(config: AnyConfig, process_start: float) -> int:
    """Trains the run to its end (or to where it is told to stop) and returns the process's exit code.

    Raises:
        ValueError: the config, data, run directory or checkpoints can't be used; the same message on all ranks.
        CheckpointError, TrainingError: something failed on the way.
    """
    stop = StopRequest()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ranks = distributed.start()
    directory = RunDirectory(config.run.dir)
    with ranks.fail_together():
        check_world_size(config, ranks.world_size)
        if ranks.is_main:
            directory.open()
            stop.watch(directory.stop_file)
    try:
        return _train(config, ranks, directory, stop, process_start)
    except BaseException as error:
        if ranks.is_main:
            _note_failure(directory, error)
        raise


def _train(config: AnyConfig, ranks: Ranks, directory: RunDirectory, stop: StopRequest, process_start: float) -> int:
    """What `run` does with the run directory in its hands."""
    last_step = min(config.train.stop_at_step or config.train.steps, config.train.steps)
    if ranks.broadcast(_is_done(config, last_step)):
        if ranks.is_main:
            print(_done_message(config, last_step), flush=True)
            _write_reached(directory, config, last_step)
        return EXIT_FINISHED
    with ranks.fail_together():
        data = build_data(config, ranks.rank, ranks.world_size)
        nvme.prepare(config, zero_settings(config))
        changes = _compare_with_newest(config, data.digest, ranks.world_size)
    check_agreement(ranks, config, data.digest)

    checkpoints = Checkpoints(config.run.dir, ranks, config.checkpoint.keep, config.checkpoint.in_background)
    watchdog = Watchdog(directory, ranks, config.train.hang_seconds)
    with ranks.fail_together():
        if ranks.is_main:
            checkpoints.remove_partial()
            with needed(directory.path / "config.yaml"):
                (directory.path / "config.yaml").write_text(to_yaml(config))
            with needed(directory.path / "status.json"):
                directory.write_status("running")
    shared_rows = sequence_parallel.start(config)
    task = build_task(config, data.tokenizer_path, ranks.device, shared_rows)
    precision = resolve_precision(config.train.precision, ranks.device)
    engine, state = _build_engine(config, ranks, task, checkpoints, precision)
    step = state.step if state else 0
    monitor = None
    with ranks.fail_together():
        if ranks.is_main:
            monitor = Monitor(
                directory.path,
                step,
                config.train.steps,
                task.unit,
                config.monitor.every_steps,
                task.flops_per_unit(),
                to_yaml(config),
            )
    if monitor:
        _announce(monitor, config, ranks, engine, precision, step, changes, time.time() - process_start)

    trainer = Trainer(config, ranks, task, data, engine, checkpoints, monitor, stop, watchdog)
    try:
        outcome = trainer.run(step + 1, last_step)
    except TrainingError:  # met by all ranks, perhaps while a good checkpoint was being written
        checkpoints.finish()
        raise
    finally:
        if monitor:
            monitor.close()
    ranks.barrier()
    if ranks.local_rank == 0:
        nvme.remove(config, zero_settings(config))
    watchdog.stop()
    return _finish(outcome, config, ranks, directory)


def _build_engine(
    config: AnyConfig, ranks: Ranks, task: Task, checkpoints: Checkpoints, precision: str
) -> tuple[Any, State | None]:
    """The engine, with the newest checkpoint's state, or with fresh weights that are the same on every rank."""
    torch.manual_seed(config.train.seed)
    model = build_model(task, config, ranks.world_size, precision)
    if config.model.init_from:
        with ranks.fail_together():
            weights = find_weights(model, config.model.init_from)
        partitioned = any(is_partitioned(parameter) for parameter in model.parameters())
        copy_weights(model, weights, writable, read=ranks.is_main or not partitioned)
    engine = build_engine(model, config, ranks.world_size, precision)
    # From here on the ranks draw different numbers (dropout).
    torch.manual_seed(config.train.seed * 1_000_003 + ranks.rank)
    return engine, checkpoints.load_newest(engine)


def _is_done(config: AnyConfig, last_step: int) -> bool:
    return (checkpoint_steps(Path(config.run.dir) / "checkpoints") or [0])[-1] >= last_step


def _done_message(config: AnyConfig, last_step: int) -> str:
    if last_step < config.train.steps:
        return f"{config.run.dir} has reached train.stop_at_step={last_step} already; raise or leave out train.stop_at_step to go on"
    return (
        f"{config.run.dir} is trained already: all {last_step} steps. To train further raise train.steps; "
        f"to train anew give another run.dir or remove {config.run.dir}"
    )


def _compare_with_newest(config: AnyConfig, data_digest: str, world_size: int) -> list[str]:
    """Refuses, before the model is built, to continue another run; a damaged checkpoint is dealt with at loading."""
    if not checkpoint_steps(Path(config.run.dir) / "checkpoints"):
        return []
    try:
        state = State.read(newest_checkpoint(config.run.dir))
    except (OSError, ValueError, TypeError):
        return []
    changes = check_same_run(state, config, data_digest)
    if state.world_size != world_size:
        changes.append(f"there were {state.world_size} ranks and are now {world_size}")
    return changes


def _announce(
    monitor: Monitor,
    config: AnyConfig,
    ranks: Ranks,
    engine: Any,
    precision: str,
    step: int,
    changes: list[str],
    seconds: float,
) -> None:
    parameters = parameter_count(engine.module)
    place = (
        f"{ranks.world_size} x {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else f"{ranks.world_size} CPU ranks"
    )
    monitor.say(
        f"{parameters / 1e6:.2f}M parameters, {place}, ZeRO-{engine.zero_optimization_stage()}, {precision}, "
        f"run directory {config.run.dir}"
    )
    if config.train.sequence_parallel_size > 1:
        monitor.say(f"{config.train.sequence_parallel_size} ranks share each row (train.sequence_parallel_size)")
    for change in changes:
        monitor.say(f"warning: {change}")
    monitor.say(f"{'continuing after' if step else 'starting before'} step {step or 1} ({seconds:.1f} s since launch)")


def _finish(outcome: Outcome, config: AnyConfig, ranks: Ranks, directory: RunDirectory) -> int:
    if not ranks.is_main:
        return EXIT_STOPPED if outcome.stopped_by else EXIT_FINISHED
    if outcome.stopped_by:
        _write_end(directory, "stopped", EXIT_STOPPED, outcome.step, outcome.stopped_by)
        print(
            f"stopped by {outcome.stopped_by} after step {outcome.step}; start the same command again to continue",
            flush=True,
        )
        return EXIT_STOPPED
    _write_reached(directory, config, outcome.step)
    print(f"reached step {outcome.step} of {config.train.steps}; results in {config.run.dir}", flush=True)
    return EXIT_FINISHED


def _write_reached(directory: RunDirectory, config: AnyConfig, step: int) -> None:
    if step >= config.train.steps:
        _write_end(directory, "finished", EXIT_FINISHED, step, "train.steps")
    else:
        _write_end(directory, "stopped", EXIT_FINISHED, step, "train.stop_at_step")


def _write_end(directory: RunDirectory, state: str, exit_code: int, step: int, reason: str) -> None:
    """What the run has reached is saved by now: that no file says so is not worth failing for."""
    try:
        directory.write_status(state, exit_code=exit_code, step=step, reason=reason)
    except OSError as error:
        show(f"warning: {directory.path / 'status.json'} can't be written ({error.strerror}): it should say {state}")


def _note_failure(directory: RunDirectory, error: BaseException) -> None:
    """For the supervisor: what the user has to mend, and what would happen again, is not worth a restart."""
    started = not isinstance(error, ValueError)  # else the config, the data or the directory can't be used as asked
    with contextlib.suppress(OSError):  # the disk may be what failed
        directory.write_status(
            "failed",
            exit_code=EXIT_ERROR if started else EXIT_USAGE,
            reason=str(error).strip().split("\n")[0] or type(error).__name__,
            restart=started and not isinstance(error, (TrainingError, KeyboardInterrupt)),
        )
