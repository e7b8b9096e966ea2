"""Runs a launch command until the training it starts is done: `python -m launch.supervise -- COMMAND...`.

    python -m launch.supervise -- deepspeed --num_accelerators 8 --module train CONFIG key=value...

A job that dies or hangs is ended whole and started again, from its last checkpoint, for as long as it makes progress. A stop
signal (SIGTERM, SIGINT, SIGUSR1) becomes the file RUN/stop, which rank 0 looks for at every step: whatever the launcher does
with signals, and on whichever host the ranks are, they finish their step, save and exit. What became of a job is read from
RUN/status.json, since launchers lose exit codes. Exit codes are those of `python -m train`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil

from train.config import AnyConfig, read_config
from train.network import free_port
from train.run_directory import EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE, RunDirectory, checkpoint_steps
from train.signals import STOP_SIGNALS
from train.watchdog import GRACE_SECONDS, SLOW, keep_stacks

POLL_SECONDS = 0.2
# A launcher that is told to end needs this long: DeepSpeed's gives the ranks of the other hosts 30 seconds.
LAUNCHER_SECONDS = 45
LONGEST_WAIT = 300.0  # between two starts
READY_SECONDS = 3600  # for the hosts to come back
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Outcome:
    """How one start of the job ended."""

    exit_code: int  # of `python -m train`
    reason: str
    restart: bool = False  # starting it again might help


class Supervisor:
    """Starts the job, watches it, ends it, and decides whether to start it again."""

    def __init__(self, config: AnyConfig, options: argparse.Namespace) -> None:
        self._options = options
        self._directory = RunDirectory(config.run.dir)
        self._hang_seconds = config.train.hang_seconds
        self._may_write = False  # into the run directory, which a job of ours has had
        self._stop: str | None = None  # the first stop signal
        self._interrupts = 0
        self._wake = threading.Event()
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        # Ranks that outlive their launcher become children of this process, so that they can be found and ended.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)

    def run(self) -> int:
        """Returns the exit code once the training is done, was asked to stop, or can't go on."""
        restarts = failures = 0  # failures: starts in a row that made no new checkpoint
        while True:
            if not self._hosts_are_ready():
                return EXIT_STOPPED if self._stop else EXIT_ERROR
            before = self._newest_step()
            outcome = self._run_job(is_restart=restarts > 0)
            if self._stop and outcome.restart:  # it died while it was stopping: going on is for the next start
                why = f"stopped by {self._stop}, but {outcome.reason}"
                self._write_status("stopped", exit_code=EXIT_STOPPED, step=self._newest_step(), reason=why)
                outcome = Outcome(EXIT_STOPPED, why)
            if not outcome.restart:
                self._say(f"end: {outcome.reason} (exit code {outcome.exit_code})")
                return outcome.exit_code
            failures = 0 if self._newest_step() > before else failures + 1
            reason = self._why_not_again(restarts, failures, outcome.reason)
            if reason:
                self._write_status("failed", exit_code=EXIT_ERROR, reason=reason)
                self._say(f"giving up: {reason}")
                return EXIT_ERROR
            restarts += 1
            wait = min(self._options.backoff * 2**failures, LONGEST_WAIT)
            total = self._directory.read_status().get("restarts", 0) + 1
            self._write_status("failed", exit_code=EXIT_ERROR, reason=outcome.reason, restarts=total)
            self._say(f"restart {restarts} in {wait:g} s after step {self._newest_step()}: {outcome.reason}")
            if self._sleep(wait):
                self._write_status("stopped", exit_code=EXIT_STOPPED, step=self._newest_step(), reason=self._stop)
                return EXIT_STOPPED

    def _why_not_again(self, restarts: int, failures: int, reason: str) -> str | None:
        if failures >= self._options.patience:
            return f"{failures} starts in a row made no new checkpoint; the last one ended with: {reason}"
        if restarts >= self._options.max_restarts:
            return f"restarted {restarts} times, --max-restarts; the last one ended with: {reason}"
        return None

    def _hosts_are_ready(self) -> bool:
        """Waits until `--ready COMMAND` succeeds, for an hour at most; False after a stop signal, too."""
        deadline = time.monotonic() + READY_SECONDS
        while self._options.ready and subprocess.run(self._options.ready, shell=True).returncode != 0:
            self._say(f"waiting: `{self._options.ready}` fails")
            if time.monotonic() > deadline or self._sleep(self._options.backoff):
                return False
        return True

    def _run_job(self, is_restart: bool) -> Outcome:
        port = str(free_port())
        command = [argument.replace("{port}", port) for argument in self._options.command]
        status_before = self._directory.read_status()
        # A session of its own: a terminal's Ctrl-C reaches the supervisor alone.
        job = subprocess.Popen(command, start_new_session=True, text=True)
        hung = self._watch(job, command, status_before)
        self._end(job)
        status = self._directory.read_status()
        if status == status_before:  # it never had the run directory
            if self._stop:
                return Outcome(EXIT_STOPPED, f"stopped by {self._stop} before it began")
            usage = job.returncode == EXIT_USAGE and not is_restart
            code = EXIT_USAGE if usage else EXIT_ERROR
            return Outcome(code, f"the job ended before it began ({_describe(job.returncode)})", restart=not usage)
        if status["state"] in ("finished", "stopped"):
            return Outcome(status["exit_code"], f"{status['state']} at step {status['step']} ({status['reason']})")
        if status["state"] == "failed":
            # What is a user's mistake at first has come from outside if it comes later: a mount lost, a port taken.
            restart = status["restart"] or (is_restart and status["exit_code"] == EXIT_USAGE)
            return Outcome(status["exit_code"], status["reason"], restart)
        reason = self._why_killed(hung) or f"the job was killed ({_describe(job.returncode)})"
        self._write_status("failed", exit_code=EXIT_ERROR, reason=reason)
        return Outcome(EXIT_ERROR, reason, restart=self._interrupts < 2)

    def _why_killed(self, hung: bool) -> str | None:
        if self._interrupts > 1:
            return "interrupted twice"
        stacks = keep_stacks(self._directory) if self._options.node_rank == 0 else None
        if stacks:
            return f"hung: no progress for {self._hang_seconds} s; the stacks of its ranks are in {stacks}"
        return "hung: no heartbeat, and no rank could write down its stacks" if hung else None

    def _watch(self, job: subprocess.Popen[str], command: list[str], status_before: dict[str, Any]) -> bool:
        """Waits for the job's end, passing on a stop signal; True if it hangs, and has to be ended."""
        due = time.time() + SLOW * self._hang_seconds
        has_directory = told_to_stop = False
        while job.poll() is None and self._interrupts < 2:
            # Until it has changed the status, the run directory may be another job's.
            if self._directory.read_status() != status_before:
                if not has_directory:
                    has_directory = self._may_write = True
                    self._say(f"start: {shlex.join(command)}")
                due = self._directory.heartbeat.stat().st_mtime
                if self._stop and not told_to_stop:
                    with contextlib.suppress(OSError):  # a full disk: tried again
                        self._directory.ask_to_stop(self._stop)
                        told_to_stop = True
                        self._say(f"stop: {self._stop}")
            elif self._stop:
                return False  # there is nothing to save yet
            # The ranks end themselves first, if they can.
            if time.time() > due + 2 * GRACE_SECONDS:
                return True
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()
        return False

    def _end(self, job: subprocess.Popen[str]) -> None:
        """Ends all processes of the job: the launcher first, which knows of other hosts, then what is left here."""
        if job.poll() is None:
            job.terminate()
            job.send_signal(signal.SIGCONT)  # it may be stopped itself
            try:
                job.wait(LAUNCHER_SECONDS)
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()
        while left := psutil.Process().children(recursive=True):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=1)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stop = self._stop or signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        self._wake.set()

    def _sleep(self, seconds: float) -> bool:
        """True if a stop signal has come."""
        deadline = time.monotonic() + seconds
        while not self._stop and (left := deadline - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()
        return self._stop is not None

    def _newest_step(self) -> int:
        return (checkpoint_steps(self._directory.path / "checkpoints") or [0])[-1]

    def _write_status(self, state: str, **details: object) -> None:
        if self._may_write and self._options.node_rank == 0:
            with contextlib.suppress(OSError):  # the disk may be what failed
                self._directory.write_status(state, **details)

    def _say(self, text: str) -> None:
        """A line on the terminal and in RUN/log.txt."""
        line = f"supervisor: {text}"
        print(line, file=sys.stderr, flush=True)
        if self._may_write and self._options.node_rank == 0:
            with contextlib.suppress(OSError):
                self._directory.log(line)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        config = read_config(*_training_arguments(options.command))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return Supervisor(config, options).run()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--max-restarts", type=int, default=100, help="default: 100")
    parser.add_argument("--patience", type=int, default=4, help="starts without a new checkpoint (default: 4)")
    parser.add_argument(
        "--backoff",
        type=float,
        default=5,
        help="seconds before a restart, doubled for each start without a new checkpoint (default: 5)",
    )
    parser.add_argument(
        "--ready", help="shell command that succeeds when all hosts can be used; waited for before each start"
    )
    parser.add_argument(
        "--node-rank",
        type=int,
        default=0,
        help="where each host has a supervisor, only that of host 0 writes status and log",
    )
    parser.add_argument(
        "command", nargs="+", help="-- LAUNCHER... train CONFIG key=value...; {port} becomes a free port"
    )
    return parser.parse_args(arguments)


def _training_arguments(command: list[str]) -> tuple[str, list[str]]:
    """CONFIG and the overrides, which follow `-m train` or `--module train` in the command."""
    for index, pair in enumerate(itertools.pairwise(command)):
        if pair in (("-m", "train"), ("--module", "train")):
            arguments = command[index + 2 :]
            if arguments and not any(argument.startswith("-") for argument in arguments):
                return arguments[0], arguments[1:]
    raise ValueError(
        f"the command must end in `-m train CONFIG ...` or `--module train CONFIG ...`: {shlex.join(command)}"
    )


def _describe(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


if __name__ == "__main__":
    sys.exit(main())
