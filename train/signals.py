"""Signals that ask a run to stop, and the file that does the same: noted here, acted on between two steps."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stop signal. A second Ctrl-C gives up at once, without a checkpoint.

    The file reaches a run whose launcher keeps signals from its ranks, or has them on other hosts. What it holds, the
    name of a signal if the supervisor wrote it, is the reason that the run gives.

    The DeepSpeed launcher answers Ctrl-C with a SIGTERM to every rank that has just had the terminal's SIGINT, so only a
    second SIGINT can mean impatience.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._reason: str | None = None
        self._interrupts = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def watch(self, file: Path) -> None:
        """Looks for `file`, too. One rank that does is enough. What is there already was meant for an earlier start."""
        file.unlink(missing_ok=True)
        self._file = file

    @property
    def reason(self) -> str | None:
        """Why to stop: a signal's name, or what the file holds; None to go on."""
        if self._reason is None and self._file and self._file.exists():
            self._reason = self._file.read_text().strip() or f"the file {self._file}"
        return self._reason

    def done(self) -> None:
        """The request has been heeded: it must not stop the next start."""
        if self._file:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
