"""What training a recipe takes beside the model itself: ranks, the trainer, starting, saving, resuming.

    python -m benchmarks.training configs/language/quickstart.yaml

starts real jobs on all processors of this machine, one after the other:

1. one process with all threads and two ranks with half of them each, in turn; in each of them the trainer and bare loops
   take turns (`benchmarks.loops` has which);
2. `launch/local.sh` on two ranks: to the first step of a new run, and of one that resumes from a checkpoint; how long each
   checkpoint holds up training, at once and in the background.

Numbers are worth something on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.loops import LOOPS
from benchmarks.step import compare
from train.config import load_config
from train.tasks import build_task

REPOSITORY = Path(__file__).parents[1]
WORLD_SIZES = (1, 2)
SAVES = 3  # in a run: one every two steps
Seconds = dict[str, list[float]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="recipe, such as configs/language/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    parser.add_argument("--repeats", type=int, default=2, help="of every job (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each loop in a job (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    recipe = [options.config, *options.overrides]
    threads = len(os.sched_getaffinity(0))
    if threads % 2:
        raise SystemExit(
            f"error: {threads} processors can't be shared by two ranks evenly: give it two or more by taskset"
        )
    task = build_task(config, None, torch.device("cpu"))
    units = config.train.global_batch_size * task.units_per_sample

    loops: dict[int, Seconds] = {world_size: {name: [] for name in LOOPS} for world_size in WORLD_SIZES}
    runs: Seconds = {}
    for _ in range(options.repeats):
        for world_size in WORLD_SIZES:
            for name, seconds in measure_loops(recipe, world_size, threads // world_size, options.rounds).items():
                loops[world_size][name] += seconds
        for name, seconds in measure_run(recipe).items():
            runs.setdefault(name, []).extend(seconds)
    print(f"{' '.join(recipe)}, {threads} threads in all, torch {torch.__version__}")
    for line in [*loop_table(loops, units, task.unit), "", *run_table(runs)]:
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"loops": loops, "runs": runs}, indent=2) + "\n")
    return 0


def measure_loops(recipe: list[str], world_size: int, threads: int, rounds: int) -> Seconds:
    """Seconds a step of each loop, turn by turn, in a job of its own."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += ["-m", "benchmarks.loops", *recipe, f"--rounds={rounds}", f"--json={file}"]
        _check(subprocess.run(command, cwd=REPOSITORY, env=_environment(threads), capture_output=True, text=True))
        seconds: Seconds = json.loads(file.read_text())
    return seconds


def measure_run(recipe: list[str]) -> Seconds:
    """Starts a run of two ranks, and resumes it: seconds to the first step, and that checkpoints hold up training."""
    found: Seconds = {}
    steps = 2 * SAVES
    settings = ["checkpoint.every_steps=2", "checkpoint.keep=1", "evaluate.every_steps=0", "evaluate.prompts=[]"]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        first = [*recipe, *settings, f"run.dir={run_dir}"]
        found["launch to first step"] = [_launch([*first, f"train.stop_at_step={steps}"], run_dir, 1)]
        in_background = [*first, f"train.stop_at_step={2 * steps}", "checkpoint.in_background=true"]
        found["launch to first step, resumed"] = [_launch(in_background, run_dir, steps + 1)]
        stalls = [float(s) for s in re.findall(r"held up training for (\S+) s", (run_dir / "log.txt").read_text())]
    assert len(stalls) == 2 * SAVES, stalls
    found["a checkpoint holds up training"] = stalls[:SAVES]
    found["the same, in the background"] = stalls[SAVES:]
    return found


def _launch(arguments: list[str], run_dir: Path, step: int) -> float:
    """Runs a job to its end; returns the seconds until it had made `step`."""
    start, seconds = time.perf_counter(), 0.0
    with subprocess.Popen(
        [REPOSITORY / "launch" / "local.sh", *arguments],
        cwd=REPOSITORY,
        env=_environment(len(os.sched_getaffinity(0)) // 2) | {"RANKS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        while job.poll() is None and not seconds:
            if _last_step(run_dir / "metrics.jsonl") >= step:
                seconds = time.perf_counter() - start
            time.sleep(0.01)
        output, _ = job.communicate()
    _check(subprocess.CompletedProcess(arguments, job.returncode, output, ""))
    return seconds


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _environment(threads: int) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "PATH": path, "OMP_NUM_THREADS": str(threads)}


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise SystemExit(
            f"error: {done.args} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )


def loop_table(loops: dict[int, Seconds], units: int, unit: str) -> Iterator[str]:
    """A line a loop and world size: time over that of the trainer beside it, milliseconds a step, throughput.

    The ratio is the median of the turns' ratios; the spread is (third - first quartile) / median.
    """
    yield f"{'':30s}  ratio   step ms      {unit}/s"
    for world_size, seconds in loops.items():
        for name in LOOPS:
            where = "1 process" if world_size == 1 else f"{world_size} ranks"
            rate = units / statistics.median(seconds[name])
            yield f"{where:9s}  {name:19s}  {compare(seconds[name], seconds['trainer'])}  {rate:10,.0f}"


def run_table(runs: Seconds) -> Iterator[str]:
    """A line for each thing that was timed: the median, and the smallest and largest."""
    for name, seconds in runs.items():
        yield f"{name:32s}  {statistics.median(seconds):6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f} of {len(seconds)})"


if __name__ == "__main__":
    sys.exit(main())
