"""Points, texts and images for TensorBoard, in an event file that outlasts a full disk.

torch's `SummaryWriter` makes the same files, but the thread that writes them ends at the first error of the disk, and with
it what was on its way. The formats are tensorboard's and torch's here too.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from train.patient_file import PatientFile


class TensorBoardFile:
    """A new event file in `directory`. With `first_step`, what older files have from that step on is not shown."""

    def __init__(self, directory: Path, first_step: int | None, warn: Callable[[str], None]) -> None:
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = PatientFile(directory / name, warn)
        self._add(file_version="brain.Event:2")
        if first_step is not None:
            self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(step=step, summary=summary.scalar(tag, value))

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._add(step=step, summary=summary.text(tag, markdown))

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """`image` is (3, h, w), of floats from 0 to 1."""
        self._add(step=step, summary=summary.image(tag, image, dataformats="CHW"))

    def close(self) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._file.write(record.getvalue())
