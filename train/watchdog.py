"""Notices a rank that gets no further: its stacks are written down, then its process ends.

Both timers work without the interpreter: faulthandler dumps from a thread of its own that needs no lock, and the kernel ends
the process with SIGALRM. A rank whose whole process is stopped can do neither, but the others, which wait for it, do; and
the supervisor sees that rank 0's heartbeat is overdue.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from train.run_directory import RunDirectory, needed

if TYPE_CHECKING:  # the supervisor needs no torch
    from train.distributed import Ranks

# Between a rank's stack dump and its end: all ranks have written theirs before the first one ends.
GRACE_SECONDS = 10
# Starting, loading, saving and the first step may take this many times train.hang_seconds.
SLOW = 10


class Watchdog:
    """Every rank has one, and says with `beat` that it has got further.

    Raises:
        ValueError: on all ranks, where one can't write into the run directory.
    """

    def __init__(self, directory: RunDirectory, ranks: Ranks, seconds: int) -> None:
        self._seconds = seconds
        self._heartbeat = directory.heartbeat if ranks.is_main else None
        self._stacks = directory.path / "stacks" / f"rank_{ranks.rank:05d}.txt"
        with ranks.fail_together():
            if ranks.is_main:
                with needed(self._stacks.parent):
                    self._stacks.parent.mkdir(exist_ok=True)
                    for left_over in self._stacks.parent.iterdir():
                        left_over.unlink()
                    directory.heartbeat.touch()
        with ranks.fail_together(), needed(self._stacks):
            self._file = open(self._stacks, "w")
        self.beat(slow=True)

    def beat(self, slow: bool = False) -> None:
        """Starts the time anew in which the next `beat` has to follow."""
        limit = self._seconds * (SLOW if slow else 1)
        faulthandler.dump_traceback_later(limit, file=self._file)
        signal.setitimer(signal.ITIMER_REAL, limit + GRACE_SECONDS)
        if self._heartbeat:
            with contextlib.suppress(OSError):  # a disk that is read-only meanwhile is the checkpoint's to report
                os.utime(self._heartbeat, times=(time.time(), time.time() + limit))

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._file.close()
        self._stacks.unlink(missing_ok=True)


def keep_stacks(directory: RunDirectory) -> Path | None:
    """Where the stacks of a job that hung are kept from now on; None if no rank has written any down."""
    stacks = directory.path / "stacks"
    if not any(path.stat().st_size for path in stacks.glob("rank_*.txt")):
        return None
    kept = directory.path / time.strftime("stacks_%Y%m%dT%H%M%S")
    with contextlib.suppress(OSError):  # a read-only disk
        os.rename(stacks, kept)
        return kept
    return stacks
