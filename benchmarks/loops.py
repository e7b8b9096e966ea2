"""Times the trainer beside bare loops over the same recipe, in one job; `benchmarks.training` starts it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.loops configs/language/quickstart.yaml --json FILE

The loops take turns of a few steps each, so that what else the machine does falls on all alike:

    trainer               all that a run does in a step: data loader, what ranks agree on, metrics, TensorBoard, watchdog
    engine alone          the trainer's own model and DeepSpeed engine, on batches that are ready
    plain loop            as in nanoGPT, without DeepSpeed: float32 weights, autocast, torch's fused AdamW, clipping, and
                          DistributedDataParallel where there are several ranks; the same model
    plain loop, softmax   the same with one SDPA in place of twicing, and no documents kept apart
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step import Candidate, timed_step
from train import distributed
from train.config import AnyConfig, load_config, to_yaml
from train.data.loader import build_data
from train.distributed import Ranks
from train.engine import build_engine, build_model, parameter_groups
from train.loop import Trainer
from train.monitor import Monitor
from train.precision import DTYPES, resolve_precision
from train.run_directory import RunDirectory
from train.signals import StopRequest
from train.tasks import Batch, Task, build_task, targets
from train.watchdog import Watchdog

TURN = 10  # steps; as many as between two points in TensorBoard
LOOPS = ("trainer", "engine alone", "plain loop", "plain loop, softmax")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="recipe, such as configs/language/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--rounds", type=int, default=6, help=f"turns of {TURN} steps a loop (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="seconds a step, turn by turn")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    if config.train.sequence_parallel_size > 1:
        parser.error("train.sequence_parallel_size must be 1: the plain loops share no rows")
    config.train.micro_batch_size = None  # one forward pass a step, in all loops
    config.train.steps, config.train.stop_at_step = 10**6, None
    config.evaluate.every_steps = 0
    ranks = distributed.start()
    try:
        seconds = _measure(config, ranks, options.rounds)
        if ranks.is_main:
            options.json.write_text(json.dumps(seconds))
    finally:
        distributed.stop()
    return 0


def _measure(config: AnyConfig, ranks: Ranks, rounds: int) -> dict[str, list[float]]:
    """Seconds a step, by loop, of each of its turns."""
    data = build_data(config, ranks.rank, ranks.world_size)
    task = build_task(config, None, ranks.device)
    precision = resolve_precision(config.train.precision, ranks.device)
    torch.manual_seed(config.train.seed)
    engine = build_engine(build_model(task, config, ranks.world_size, precision), config, ranks.world_size, precision)
    batches = data.train_batches(first_n=0)
    ready = [{key: value.to(ranks.device) for key, value in next(batches).items()} for _ in range(TURN)]
    alone = Candidate("engine alone", engine)
    plain = PlainLoop(config, task, ranks, precision)
    softmax_config = deepcopy(config)
    softmax_config.model.twicing_layers = "none"
    softmax = PlainLoop(softmax_config, build_task(softmax_config, None, ranks.device), ranks, precision, mixed=True)
    with tempfile.TemporaryDirectory() as run_dir:
        # Of rank 0: the others' is not used.
        directory = RunDirectory(ranks.broadcast(run_dir))
        watchdog = Watchdog(directory, ranks, config.train.hang_seconds)
        trainer = _trainer(config, ranks, task, Stream(batches, data.digest), engine, directory, watchdog)
        turns: dict[str, Callable[[int], Any]] = {
            "trainer": lambda number: trainer.run(number * TURN + 1, (number + 1) * TURN),
            "engine alone": lambda number: [timed_step(alone, task, batch) for batch in ready],
            "plain loop": lambda number: plain.steps(ready),
            "plain loop, softmax": lambda number: softmax.steps(ready),
        }
        seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
        for number in range(rounds + 1):  # the first warms up
            for name in LOOPS:
                watchdog.beat(slow=True)
                ranks.barrier()
                start = time.perf_counter()
                turns[name](number)
                ranks.barrier()
                seconds[name] += [(time.perf_counter() - start) / TURN] * (number > 0)
        watchdog.stop()
    return seconds


def _trainer(
    config: AnyConfig,
    ranks: Ranks,
    task: Task,
    data: Stream,
    engine: Any,
    directory: RunDirectory,
    watchdog: Watchdog,
) -> Trainer:
    monitor = None
    if ranks.is_main:
        flops, every = task.flops_per_unit(), config.monitor.every_steps
        monitor = Monitor(directory.path, 0, config.train.steps, task.unit, every, flops, to_yaml(config))
    stop = StopRequest()
    if ranks.is_main:
        stop.watch(directory.stop_file)
    return Trainer(config, ranks, task, data, engine, NothingSaved(), monitor, stop, watchdog)  # type: ignore[arg-type]


class Stream:
    """The training batches, going on where the turn before left off."""

    def __init__(self, batches: Iterator[Batch], digest: str) -> None:
        self._batches = batches
        self.digest = digest

    def train_batches(self, first_n: int) -> Iterator[Batch]:
        return self._batches


class NothingSaved:
    """In place of `train.checkpoint.Checkpoints`: what saving costs is measured by itself."""

    def save(self, engine: Any, state: Any) -> None:
        pass

    def is_written(self) -> bool:
        return False

    def finish(self) -> None:
        return None


class PlainLoop:
    """A training loop without this trainer and without DeepSpeed. `mixed`: rows are not split into documents."""

    def __init__(self, config: AnyConfig, task: Task, ranks: Ranks, precision: str, mixed: bool = False) -> None:
        torch.manual_seed(config.train.seed)
        model = task.build_model().to(ranks.device)
        settings = config.optimizer
        groups = parameter_groups(model, settings.weight_decay)
        betas = (settings.betas[0], settings.betas[1])
        self._optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
        self._model = DistributedDataParallel(model) if ranks.world_size > 1 else model
        self._clip = settings.grad_clip or float("inf")
        self._task, self._mixed = task, mixed
        self._autocast = torch.autocast(ranks.device.type, DTYPES[precision], enabled=precision != "fp32")

    def steps(self, batches: list[Batch]) -> None:
        for batch in batches:
            seen: Any = {**batch, "cu_seqlens": None} if self._mixed else batch
            with self._autocast:
                loss = self._task.loss_sum(self._model, seen, 0) / targets(batch, self._task.units_per_sample)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
