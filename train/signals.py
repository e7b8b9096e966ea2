"""Signals that ask a run to stop: noted here, acted on between two steps."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stop signal. A second Ctrl-C gives up at once, without a checkpoint.

    The DeepSpeed launcher answers Ctrl-C with a SIGTERM to every rank that has just had the terminal's SIGINT, so only a
    second SIGINT can mean impatience.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupts = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
