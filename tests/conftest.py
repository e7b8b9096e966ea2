"""Fixtures for the tests that run the real thing: real data, real launchers, several processes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing

REPOSITORY = Path(__file__).parents[1]
LANGUAGE = "configs/language/quickstart.yaml"
VISION = "configs/vision/quickstart.yaml"


@pytest.fixture(scope="session")
def prepare() -> Callable[..., Path]:
    """`prepare(name, *arguments)`: real data, kept in data/ between runs of the tests, as the quick starts keep it."""

    def run(name: str, *arguments: str) -> Path:
        out = REPOSITORY / "data" / name
        out.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "train.prepare", *arguments, "--out", str(out)]
        with open(out.parent / ".lock", "w") as lock:  # the tests run in several processes
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run(command, cwd=REPOSITORY, check=True, timeout=600)
        return out

    return run


@pytest.fixture(scope="session")
def wikipedia(prepare: Callable[..., Path]) -> Path:
    """The data set of the language quick start."""
    return prepare("wikipedia", "text", "--source=wikipedia-summaries", "--vocab-size=1024")


@pytest.fixture(scope="session")
def fashion_mnist(prepare: Callable[..., Path]) -> Path:
    """The data set of the vision quick start."""
    return prepare("fashion-mnist", "images", "--source=fashion-mnist")


@dataclass
class Job:
    """A training job started through a launcher, in a process group of its own."""

    process: subprocess.Popen[str]
    run_dir: Path
    output: str = ""
    _log: Path = field(default=Path())

    def wait(self, timeout: float = 240) -> int:
        """The launcher's exit code; kills the job and fails when it takes too long."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the job did not end within {timeout} s:\n{self._log.read_text()[-3000:]}")
        self.output = self._log.read_text()
        return code

    def kill(self) -> None:
        for pid in self.ranks():
            os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def ranks(self) -> list[int]:
        """Process ids of the job's ranks, found by the run directory on their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                is_worker = b"--local_rank" in Path(f"/proc/{parent}/cmdline").read_bytes()
            except OSError:  # it ended meanwhile
                continue
            if (
                f"run.dir={self.run_dir}".encode() in command
                and b"train" in command
                and b"-m" in command
                and not is_worker
            ):
                found.append(int(entry.name))
        return found

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_output(self, text: str, timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while text not in self._log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the job did not say {text!r}:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.05)

    def wait_for_step(self, step: int, timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.metrics()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the job did not reach step {step}:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.05)


Launch = Callable[..., Job]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts `launcher CONFIG key=value...` with two or so ranks; jobs still running at the end of the test are killed."""
    jobs: list[Job] = []

    def start(
        config: str,
        run_dir: Path,
        *overrides: str,
        launcher: str = "deepspeed",
        port: str | None = None,
        ranks: int = 2,
    ) -> Job:
        commands = {
            "deepspeed": [
                "deepspeed",
                f"--num_accelerators={ranks}",
                f"--master_port={port or free_port()}",
                "--module",
                "train",
            ],
            "torchrun": ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m", "train"],
            "local.sh": ["launch/local.sh"],
            "python": [sys.executable, "-m", "train"],
        }
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RANKS": str(ranks),
            "PYTHONPATH": str(REPOSITORY),
        }
        log = tmp_path / f"output_{len(jobs)}.txt"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [*commands[launcher], config, f"run.dir={run_dir}", *overrides],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,
            )
        jobs.append(Job(process, run_dir, _log=log))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def _heed_ctrl_c() -> None:
    """Tests started in the background inherit that SIGINT is ignored, and a shell can't trap what it was told to ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_rank(rank: int, function: Callable[..., None], world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    from train import distributed

    os.environ.update(
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    ranks = distributed.start()
    try:
        function(ranks, *arguments)
    finally:
        distributed.stop()


@pytest.fixture
def run_distributed() -> Callable[..., None]:
    """`run_distributed(function, world_size, *arguments)` calls `function(ranks, *arguments)` in as many gloo processes."""

    def run(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
        multiprocessing.spawn(_run_rank, (function, world_size, free_port(), arguments), nprocs=world_size)

    return run


@contextmanager
def _mounted(path: Path, options: str) -> Iterator[None]:
    """A file system in memory at `path`, with `mount -o options`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def mounted() -> Callable[[Path, str], AbstractContextManager[None]]:
    """`with mounted(path, "size=1M"): ...` for real full disks and read-only mounts; needs root."""
    return _mounted


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    """Not a byte is free on the file system of `path`."""
    filler = path / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@pytest.fixture
def filled() -> Callable[[Path], AbstractContextManager[None]]:
    """`with filled(path): ...` in a small file system that is `mounted`."""
    return _filled
