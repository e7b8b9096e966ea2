"""Times whole training steps of a recipe, with twicing and with plain softmax attention, in one run.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.step configs/language/quickstart.yaml

The recipe's own model, DeepSpeed engine and batches, one model for each candidate. Every round takes one step with each,
one after the other on the same batch, so that what else the machine does falls on all alike. What is not timed: waiting
for data, which runs report themselves as `data_wait`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from train import distributed, sequence_parallel
from train.config import AnyConfig, LanguageConfig, load_config
from train.data.loader import build_data
from train.distributed import Ranks
from train.engine import build_engine
from train.precision import resolve_precision
from train.tasks import Batch, Task, build_task, targets

PARTS = ("forward", "backward", "optimizer")


@dataclass
class Candidate:
    """A model in its engine. `separate`: whether attention keeps the documents of a row apart."""

    name: str
    engine: Any
    separate: bool = True
    seconds: list[tuple[float, ...]] = field(default_factory=list)  # of each part, step by step


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="recipe, such as configs/language/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--rounds", type=int, default=40, help="of one step with each candidate (default: %(default)s)")
    result = parser.add_mutually_exclusive_group()
    result.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    result.add_argument("--profile", action="store_true", help="instead, where the time goes in steps with twicing")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    ranks = distributed.start()
    try:
        (_profile if options.profile else _run)(config, options, ranks)
    finally:
        distributed.stop()
    return 0


def _run(config: AnyConfig, options: argparse.Namespace, ranks: Ranks) -> None:
    task, batches = _task_and_batches(config, ranks)
    candidates = _candidates(config, ranks)
    for measured in [False] * 3 + [True] * options.rounds:
        batch = next(batches)
        for candidate in candidates:
            seconds = timed_step(candidate, task, batch)
            if measured:
                candidate.seconds.append(seconds)
    if ranks.is_main:
        threads = torch.get_num_threads()
        print(f"{options.config}, {ranks.world_size} ranks of {threads} threads, torch {torch.__version__}")
        for line in table(candidates):
            print(line)
        if options.json:
            written = {c.name: [dict(zip(PARTS, step, strict=True)) for step in c.seconds] for c in candidates}
            options.json.write_text(json.dumps(written, indent=2) + "\n")


def _profile(config: AnyConfig, options: argparse.Namespace, ranks: Ranks) -> None:
    """Of `--rounds` steps of rank 0: the operations that take the most time of their own, as torch's profiler has them."""
    task, batches = _task_and_batches(config, ranks)
    candidate = _candidate("twicing: auto", config, ranks, twicing_layers="all", attention_backend="auto")
    timed_step(candidate, task, next(batches))  # what only a first step does
    with torch.profiler.profile() as profile:
        for _ in range(options.rounds):
            timed_step(candidate, task, next(batches))
    if ranks.is_main:
        print(profile.key_averages().table(sort_by=f"self_{ranks.device.type}_time_total", row_limit=25))


def _task_and_batches(config: AnyConfig, ranks: Ranks) -> tuple[Task, Iterator[Batch]]:
    data = build_data(config, ranks.rank, ranks.world_size)
    task = build_task(config, data.tokenizer_path, ranks.device, sequence_parallel.start(config))
    batches = data.train_batches(first_n=0)
    return task, ({key: value.to(ranks.device) for key, value in batch.items()} for batch in batches)


def _candidates(config: AnyConfig, ranks: Ranks) -> list[Candidate]:
    """Softmax first: all others are compared with it."""
    found = [_candidate("softmax: one SDPA", config, ranks, twicing_layers="none")]
    if isinstance(config, LanguageConfig):
        # The cheapest plain transformer: torch has no attention over packed documents on the CPU.
        found.append(Candidate("softmax, documents mixed", found[0].engine, separate=False))
    for backend in ("auto", "composed"):
        name = f"twicing: {backend}"
        found.append(_candidate(name, config, ranks, twicing_layers="all", attention_backend=backend))
    return found


def _candidate(name: str, config: AnyConfig, ranks: Ranks, **model_settings: str) -> Candidate:
    config = deepcopy(config)
    for key, value in model_settings.items():
        setattr(config.model, key, value)
    torch.manual_seed(config.train.seed)
    model = build_task(config, None, ranks.device).build_model()
    precision = resolve_precision(config.train.precision, ranks.device)
    return Candidate(name, build_engine(model, config, ranks.world_size, precision))


def timed_step(candidate: Candidate, task: Task, batch: Batch) -> tuple[float, ...]:
    """One step as the training loop makes it, on one micro-batch; seconds of its parts."""
    engine = candidate.engine
    engine.train()
    seen: dict[str, Any] = dict(batch) if candidate.separate else {**batch, "cu_seqlens": None}
    times = [time.perf_counter()]
    loss = task.loss_sum(engine, seen, 0)
    times.append(time.perf_counter())
    engine.backward(loss / targets(batch, task.units_per_sample), scale_wrt_gas=False)
    times.append(time.perf_counter())
    engine.step()
    times.append(time.perf_counter())
    return tuple(end - start for start, end in pairwise(times))


def table(candidates: list[Candidate]) -> Iterator[str]:
    """One line a candidate: its time over that of the first, then medians in milliseconds and the spread.

    The ratio is the median of the rounds' ratios; the spread is (third - first quartile) / median of whole steps.
    """
    yield f"{'':24s}  ratio   step ms" + "".join(f"{part:>11s}" for part in PARTS)
    first = [sum(step) for step in candidates[0].seconds]
    for candidate in candidates:
        whole = [sum(step) for step in candidate.seconds]
        parts = "".join(f"{1e3 * statistics.median(part):11.1f}" for part in zip(*candidate.seconds, strict=True))
        yield f"{candidate.name:24s}  {compare(whole, first)}{parts}"


def compare(seconds: list[float], others: list[float]) -> str:
    """Median of the ratios to what was measured beside it, median in milliseconds, and the spread."""
    ratio = statistics.median(one / other for one, other in zip(seconds, others, strict=True))
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{ratio:5.2f}  {1e3 * middle:6.1f} ±{(high - low) / middle:3.0%}"


if __name__ == "__main__":
    sys.exit(main())
