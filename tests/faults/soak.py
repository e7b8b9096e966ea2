"""Trains a small model under the supervisor while faults strike at random: `python tests/faults/soak.py --faults 50 --seed 0`.

Afterwards every step must be there once, with the samples, the loss and finally the weights of a run that nothing disturbed,
bit for bit, and no process and no file may be left behind. Prints a report; exit code 1 when anything differs.

Needs root: the disk that fills up is a file system of its own, and all happens in namespaces of its own, where nothing but
this test has processes and shared memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
STEPS_A_FAULT = 10  # by which the run is longer for each fault, so that it doesn't end before the last one
SETTINGS = [
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.mlp_width=64",
    "train.global_batch_size=4",
    "schedule.warmup_steps=2",
    "checkpoint.every_steps=3",
    "evaluate.every_steps=0",
    "monitor.every_steps=1000",
    "data.workers=1",
    "train.hang_seconds=5",
]
LAUNCH = [
    "-m",
    "launch.supervise",
    "--backoff=0.1",
    "--patience=20",
    "--max-restarts=1000",
    "--",
    "deepspeed",
    "--num_accelerators=2",
    "--master_port={port}",
    "--log_level=error",
    "--module",
    "train",
    "configs/language/quickstart.yaml",
]
PATIENCE = 300  # seconds: longer than any recovery takes, on a busy machine too


class SoakError(RuntimeError):
    """The run did not recover from a fault, or left something behind, or is not the run that nothing disturbed."""


class Run:
    """A training run, its supervisor and the processes below it."""

    def __init__(self, directory: Path, settings: list[str]) -> None:
        self.directory = directory
        self._settings = settings
        self._start()

    def _start(self) -> None:
        command = [sys.executable, *LAUNCH, f"run.dir={self.directory}", *self._settings]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        with open(self.directory.with_suffix(".output.txt"), "a") as output:
            self.supervisor = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def has_ended(self) -> bool:
        """If a fault made the supervisor stop, it is started again, as a person or a scheduler would."""
        code = self.supervisor.poll()
        if code == 75:
            self._start()
        elif code not in (None, 0):
            raise SoakError(f"the supervisor ended with exit code {code}")
        return code == 0

    def wait_until(self, condition: Callable[[], object], seconds: float = PATIENCE, poll: float = 0.05) -> bool:
        """False if `seconds` passed, or the run ended, before `condition()` held."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.has_ended() or time.monotonic() > deadline:
                return False
            time.sleep(poll)
        return True

    def processes(self, kind: str) -> list[psutil.Process]:
        """kind is launcher (DeepSpeed's two), rank or worker (of the data loaders)."""
        found: dict[str, list[psutil.Process]] = {"launcher": [], "rank": [], "worker": []}
        with contextlib.suppress(psutil.NoSuchProcess):  # one ended meanwhile
            for process in psutil.Process(self.supervisor.pid).children(recursive=True):
                is_rank = "--local_rank" in " ".join(process.cmdline())
                is_worker = is_rank and "--local_rank" in " ".join(psutil.Process(process.ppid()).cmdline())
                found["worker" if is_worker else "rank" if is_rank else "launcher"].append(process)
        return found[kind]

    def steps(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def is_saving(self) -> bool:
        return any((self.directory / "checkpoints").glob(".step_*.partial"))


def send(kind: str, number: int) -> Callable[[Run, random.Random], bool]:
    def strike(run: Run, draw: random.Random) -> bool:
        try:
            draw.choice(run.processes(kind)).send_signal(number)
        except (IndexError, psutil.NoSuchProcess):  # there is none at this moment
            return False
        return True

    return strike


def send_supervisor(number: int) -> Callable[[Run, random.Random], bool]:
    def strike(run: Run, draw: random.Random) -> bool:
        run.supervisor.send_signal(number)
        return True

    return strike


def fill_the_disk(run: Run, draw: random.Random) -> bool:
    """Until the ranks have died of it, or for three seconds."""
    filler, ranks = run.directory.parent / "filler", run.processes("rank")
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    run.wait_until(lambda: not any(rank.is_running() for rank in ranks), 3)
    filler.unlink()
    return True


def make_checkpoints_read_only(run: Run, draw: random.Random) -> bool:
    """Until the ranks have died of it, or for three seconds."""
    checkpoints, ranks = str(run.directory / "checkpoints"), run.processes("rank")
    if not os.path.isdir(checkpoints):
        return False
    subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", checkpoints], check=True)
    run.wait_until(lambda: not any(rank.is_running() for rank in ranks), 3)
    subprocess.run(["umount", "--lazy", checkpoints], check=True)
    return True


FAULTS: dict[str, Callable[[Run, random.Random], bool]] = {
    "SIGKILL of a rank": send("rank", signal.SIGKILL),
    "SIGKILL of a data worker": send("worker", signal.SIGKILL),
    "SIGKILL of a launcher": send("launcher", signal.SIGKILL),
    "SIGSTOP of a rank": send("rank", signal.SIGSTOP),
    "SIGTERM to a rank": send("rank", signal.SIGTERM),
    "SIGTERM to the supervisor": send_supervisor(signal.SIGTERM),
    "SIGUSR1 to the supervisor": send_supervisor(signal.SIGUSR1),
    "full disk": fill_the_disk,
    "read-only checkpoints": make_checkpoints_read_only,
}
MOMENTS = ("while it trains", "while it trains", "while it saves", "soon after the fault before")


def strike_all(run: Run, faults: list[str], draw: random.Random) -> collections.Counter[tuple[str, str]]:
    """Lets the faults strike at moments drawn at random, and waits for the end of the run."""
    struck: collections.Counter[tuple[str, str]] = collections.Counter()
    for number, fault in enumerate(faults, 1):
        step = run.steps()
        while True:
            moment = draw.choice(MOMENTS)
            if moment != "soon after the fault before":
                # A job that has started after a fault cuts the metrics back to its checkpoint: then they grow again.
                step = run.steps()
                run.wait_until(lambda step=step: run.steps() not in (step, 0))
            if moment == "while it saves":
                run.wait_until(run.is_saving, 20, poll=0.001)
            time.sleep(draw.uniform(0, {"while it saves": 0.15, "while it trains": 0.7}.get(moment, 6)))
            if run.has_ended():
                raise SoakError(f"the run ended before fault {number}: STEPS_A_FAULT must be larger")
            step = run.steps()
            if FAULTS[fault](run, draw):
                break
        struck[fault, moment] += 1
        print(f"{number:3} of {len(faults)}: {fault} {moment}, after step {step}", flush=True)
    if not run.wait_until(run.has_ended):
        raise SoakError(f"the run did not end within {PATIENCE} s of the last fault")
    return struck


def check(disturbed: Path, undisturbed: Path) -> None:
    """Everything that a person could see of the two runs is the same, and nothing else is left."""
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (undisturbed, disturbed)]
    for expected, line in zip(*lines, strict=True):
        if expected != line:
            raise SoakError(f"{line} instead of {expected}")
    newest = (undisturbed / "checkpoints" / "latest").read_text()
    weights = [(run / "checkpoints" / newest / "model.safetensors").read_bytes() for run in (undisturbed, disturbed)]
    if weights[0] != weights[1]:
        raise SoakError("the weights differ")
    for folder in ("", "checkpoints"):
        names = [
            {p.name for p in (run / folder).iterdir() if "tfevents" not in p.name} for run in (undisturbed, disturbed)
        ]
        left = {name for name in names[1] - names[0] if not name.startswith("stacks_")}
        if left:
            raise SoakError(f"left behind in {disturbed / folder}: {left}")
    if os.listdir("/dev/shm"):
        raise SoakError(f"left behind in /dev/shm: {os.listdir('/dev/shm')}")
    processes = [
        p.cmdline() for p in psutil.process_iter() if p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE
    ]
    if processes:
        raise SoakError(f"left behind: {processes}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as checkpoint.in_background=true")
    options = parser.parse_args()
    if os.getpid() != 1:
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        os.execvp(namespaces[0], [*namespaces, sys.executable, *sys.argv])
    start, draw = time.monotonic(), random.Random(options.seed)
    faults = [draw.choice([*FAULTS]) for _ in range(options.faults)]
    if options.faults >= len(FAULTS):
        faults[: len(FAULTS)] = FAULTS  # each kind at least once
        draw.shuffle(faults)
    steps = 20 + STEPS_A_FAULT * options.faults
    for place in ("/dev/shm", "/mnt"):  # seen by this test alone
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128M", "tmpfs", place], check=True)
    settings = [*SETTINGS, f"train.steps={steps}", *options.overrides]
    undisturbed, disturbed = Path("/mnt/undisturbed"), Path("/mnt/disturbed")
    try:
        run = Run(undisturbed, settings)
        run.wait_until(run.has_ended, PATIENCE + steps)
        run = Run(disturbed, settings)
        struck = strike_all(run, faults, draw)
        check(disturbed, undisturbed)
    except SoakError as error:
        output = run.directory.with_suffix(".output.txt").read_text()
        print(f"{output[-5000:]}\nFAILED with --faults {options.faults} --seed {options.seed}: {error}", flush=True)
        return 1
    starts = (disturbed / "log.txt").read_text().count("supervisor: start:")
    for (fault, moment), count in sorted(struck.items()):
        print(f"{count:4}  {fault}, {moment}")
    print(
        f"{options.faults} faults, {starts} starts, {steps} steps, {time.monotonic() - start:.0f} s: metrics and weights are those "
        "of the undisturbed run, bit for bit; no process and no file left behind"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
