"""What a run tells people: metrics.jsonl, TensorBoard, a progress bar on a terminal or plain lines in a log.

Only the main rank has a `Monitor`. Nothing here opens a network port: `tensorboard --logdir runs` is the user's to start.
Once it is made, no error of a disk or a terminal comes out of it: training is worth more than what is told of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train.patient_file import PatientFile
from train.run_directory import needed


@dataclass
class StepRecord:
    """One optimizer step, as measured."""

    step: int  # from 1
    samples: int  # n of the data order after the step
    loss: float  # mean over the targets of the global batch
    batch_hash: str  # of the sample ids over all ranks, in no order
    learning_rate: float
    gradient_norm: float | None
    units: int  # tokens or images of the global batch
    seconds: dict[str, float] = field(default_factory=dict)  # data, forward, backward, optimizer
    loss_scale: float | None = None  # fp16 only
    skipped: str | None = None  # why the step changed no weights

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class Monitor:
    """Writes into `run_dir`, starting after `step` (0 for a new run): what was written past it is cut off.

    Raises:
        ValueError: a file can't be written; only here, at the start.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        total_steps: int,
        unit: str,
        every_steps: int,
        flops_per_unit: tuple[float, float],
        config_yaml: str,
    ) -> None:
        # The import takes a second, which only this rank needs to spend.
        from train.tensorboard_file import TensorBoardFile

        self._every = every_steps
        self._unit = unit
        self._flops = flops_per_unit
        for name in ("metrics.jsonl", "validation.jsonl"):
            with needed(run_dir / name):
                _cut(run_dir / name, step)
        with needed(run_dir):
            self._metrics, self._validation, self._log = (
                PatientFile(run_dir / name, show) for name in ("metrics.jsonl", "validation.jsonl", "log.txt")
            )
            self._board = TensorBoardFile(run_dir, step + 1 if step else None, show)
        # TensorBoard renders Markdown: four leading spaces keep the YAML as it is.
        self._board.text("config", "\n".join("    " + line for line in config_yaml.splitlines()), step)
        # A terminal that reports no width, as some recorders do, would show an empty bar.
        self._on_terminal = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._on_terminal,
            smoothing=0.1,
        )
        self._total_steps = total_steps
        self._run_dir = run_dir
        self._skipped_steps = sum(skipped is not None for _, skipped in self.last_steps(step))
        self._recent: list[StepRecord] = []

    def say(self, line: str) -> None:
        """A line for the person watching and for log.txt; never breaks the progress bar."""
        self._log.write(f"{line}\n".encode())
        show(line)

    def step(self, record: StepRecord) -> None:
        """Records one step: always in metrics.jsonl, every `monitor.every_steps` in TensorBoard and the log."""
        loss = record.loss if math.isfinite(record.loss) else None
        line = dict(step=record.step, samples=record.samples, loss=loss, batch_hash=record.batch_hash)
        if record.skipped:
            line["skipped"] = record.skipped
            self._skipped_steps += 1
            self.say(f"step {record.step}/{self._total_steps}  skipped  {record.skipped}")
        self._metrics.write(f"{json.dumps(line)}\n".encode())
        self._recent.append(record)
        rate = record.units / record.total_seconds
        self._bar.set_postfix_str(f"loss {record.loss:.3f}, {rate:,.0f} {self._unit}/s", refresh=False)
        self._bar.update()
        if record.step % self._every == 0 or record.step == self._total_steps:
            self._summarise()

    def last_steps(self, count: int) -> list[tuple[float | None, str | None]]:
        """Loss, and the reason for skipping, of the last `count` steps before this start, oldest first."""
        lines = [json.loads(line) for line in (self._run_dir / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line.get("skipped")) for line in lines[-count:]] if count else []

    def _summarise(self) -> None:
        """TensorBoard points and one line of text from the steps since the last ones."""
        records, last = self._recent, self._recent[-1]
        self._recent = []
        seconds = sum(r.total_seconds for r in records)
        rate = sum(r.units for r in records) / seconds
        loss = sum(r.loss for r in records) / len(records)
        model_flops, hardware_flops = self._flops
        # TensorBoard orders its sections by name: these put accuracy and loss before the rest.
        scalars = {
            "loss/train": loss,
            "optimizer/learning_rate": last.learning_rate,
            "optimizer/gradient_norm": last.gradient_norm,
            "optimizer/loss_scale": last.loss_scale,
            "optimizer/skipped_steps": self._skipped_steps or None,
            f"speed/{self._unit}_per_second": rate,
            "step_seconds/total": seconds / len(records),
            "speed/data_wait_percent": 100 * sum(r.seconds["data"] for r in records) / seconds,
            "speed/model_teraflops": rate * model_flops / 1e12,
            "speed/hardware_teraflops": rate * hardware_flops / 1e12,
            "memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        for part in last.seconds:
            scalars[f"step_seconds/{part}"] = sum(r.seconds[part] for r in records) / len(records)
        if torch.cuda.is_available():
            scalars["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.scalars({tag: value for tag, value in scalars.items() if value is not None}, last.step)
        text = (
            f"step {last.step}/{self._total_steps}  loss {loss:.4f}  lr {last.learning_rate:.2e}  "
            f"{rate:,.0f} {self._unit}/s  {seconds / len(records):.2f} s/step"
        )
        self._log.write(f"{text}\n".encode())
        if not self._on_terminal:
            show(text)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics over the whole validation set, under their own names."""
        self._validation.write(f"{json.dumps({'step': step, **metrics})}\n".encode())
        self.scalars({f"{name}/validation": value for name, value in metrics.items()}, step)
        self.say(
            f"step {step}/{self._total_steps}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        )

    def example(self, title: str, example: str | Tensor, step: int) -> None:
        """Text, or an image (3, h, w), for TensorBoard."""
        if isinstance(example, str):
            self._board.text(title, example, step)
        else:
            self._board.image(title, example, step)

    def scalars(self, values: dict[str, Any], step: int) -> None:
        for tag, value in values.items():
            self._board.scalar(tag, value, step)

    def close(self) -> None:
        self._bar.close()
        for file in (self._metrics, self._validation, self._board, self._log):
            file.close()


def show(line: str) -> None:
    """On the terminal, beside the progress bar; it may be a file on a disk that is full."""
    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def _cut(path: Path, step: int) -> None:
    """Cuts off the lines past `step` of a file of JSON lines, and a torn last one."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                break  # the process was killed in the middle of this line
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
