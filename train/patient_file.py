"""A file that outlasts a full disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class PatientFile:
    """Appends to `path`. What can't be written is kept in memory, in order, and written when there is room again.

    A run need not end because its disk is full for a while, and what it says of itself must have neither gaps nor half
    lines. What is kept can't grow without bound: the next checkpoint needs the disk, too, and ends the run if it can't
    be written.

    Args:
        warn: is given a line when writing fails, and one when all has been written after all.

    Raises:
        OSError: the file can't be opened. Later nothing is raised.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""
        self._is_failing = False

    def write(self, data: bytes) -> None:
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            if not self._is_failing:
                self._warn(
                    f"warning: {self._path} can't be written ({error.strerror}). What belongs there is kept in memory; make "
                    "room or make it writable before the next checkpoint, which needs it"
                )
            self._is_failing = True
            return
        if self._is_failing:
            self._warn(f"{self._path} can be written again, and nothing is missing from it")
        self._is_failing = False

    def close(self) -> None:
        self.write(b"")
        if self._waiting:
            self._warn(
                f"warning: the last {len(self._waiting)} bytes of {self._path} could not be written and are lost"
            )
        os.close(self._descriptor)
