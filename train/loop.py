"""The training loop: one optimizer step after another, until the schedule's end or a request to stop.

It knows a task (loss and measures), a stream of batches, DeepSpeed's engine, checkpoints and a monitor, and nothing of
what a token or an image is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from train import engine as engines
from train.bad_steps import WINDOW, BadSteps
from train.checkpoint import Checkpoints, State
from train.config import AnyConfig, flatten
from train.data.order import sample_hash
from train.distributed import Ranks
from train.monitor import Monitor, StepRecord
from train.schedule import learning_rate
from train.signals import StopRequest
from train.tasks import Batch, Task, targets
from train.watchdog import Watchdog


class TrainingError(RuntimeError):
    """Training can't go on; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    step: int
    stopped_by: str | None  # a signal or the stop file; None when the asked-for step was reached


class Trainer:
    """Trains one run. Every rank has one; `monitor` is None except on the main rank."""

    def __init__(
        self,
        config: AnyConfig,
        ranks: Ranks,
        task: Task,
        data: Any,
        engine: Any,
        checkpoints: Checkpoints,
        monitor: Monitor | None,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._task = task
        self._data = data
        self._engine = engine
        self._checkpoints = checkpoints
        self._monitor = monitor
        self._stop = stop
        self._watchdog = watchdog
        self._micro_batches = engines.gradient_accumulation_steps(config, ranks.world_size)
        self._saved_step = 0
        self._save_seconds = 0.0  # that the save under way has held up training
        self._bad_steps = BadSteps(config.train, ranks.broadcast(monitor.last_steps(WINDOW) if monitor else None))

    def run(self, first_step: int, last_step: int) -> Outcome:
        """Trains steps `first_step` to `last_step`, 1-based and inclusive.

        Raises:
            TrainingError: too many steps had to be skipped; a sample is bad.
            CheckpointError: a checkpoint can't be written.
        """
        config, step = self._config, first_step - 1
        self._saved_step = step
        batches = self._data.train_batches(first_n=step * config.train.global_batch_size)
        while step < last_step:
            self._watchdog.beat(slow=step == first_step - 1)  # the first step may compile kernels
            record = self._train_step(step + 1, batches)
            if record is None:
                return self._stopped(step)
            step += 1
            if self._monitor:
                self._monitor.step(record)
            self._heed_skipped(record)
            if step == config.train.steps or _is_due(step, config.evaluate.every_steps):
                self.validate(step)
            if step == last_step or _is_due(step, config.checkpoint.every_steps):
                self._save(step)
        self._watchdog.beat(slow=True)
        self._finish_save()
        return Outcome(step, None)

    def _train_step(self, step: int, batches: Iterator[Batch]) -> StepRecord | None:
        """One optimizer step over a global batch; None, with nothing done, where any rank was asked to stop."""
        config, engine, world_size = self._config, self._engine, self._ranks.world_size
        first_sample = (step - 1) * config.train.global_batch_size
        seconds = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
        with self._clock(seconds, "data", step):
            micro_batches, bad_sample = self._next_micro_batches(batches)
            target_count, ids_hash, stop_requests, bad_samples, written = self._ranks.sum_integers(
                [
                    sum(targets(batch, self._task.units_per_sample) for batch in micro_batches),
                    _wrap(sum(sample_hash(batch["sample_ids"].numpy()) for batch in micro_batches)),
                    int(self._stop.reason is not None),
                    int(bad_sample is not None),
                    int(self._checkpoints.is_written()),
                ]
            )
        if written == world_size:
            self._finish_save()
        if stop_requests:
            return None
        if bad_samples:
            raise TrainingError(next(error for error in self._ranks.gather(bad_sample) if error))
        if target_count == 0:
            raise TrainingError(f"step {step}: all samples of the global batch were skipped as bad; check the data set")

        engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(micro_batches):
            with self._clock(seconds, "forward", step):
                micro_sum = self._task.loss_sum(engine, self._to_device(batch), first_sample)
            with self._clock(seconds, "backward", step):
                # DeepSpeed averages gradients over ranks; this makes it a mean over the targets of the global batch.
                engine.backward(micro_sum * (world_size / target_count), scale_wrt_gas=False)
                loss_sum += micro_sum.detach().double().cpu()
                if index < len(micro_batches) - 1:
                    engine.step()  # only counts the micro-batch
        with self._clock(seconds, "optimizer", step):
            loss = (self._ranks.sum_floats(loss_sum) / target_count).item()
            problem = self._bad_steps.problem(loss)
            rate = learning_rate(step, config)
            engines.set_learning_rate(engine, rate)
            updated = engines.take_step(engine, update=problem is None)
            if not updated and not engine.fp16_enabled():  # fp16's search for a loss scale skips steps, too
                problem = problem or "its gradient is not finite"
        return StepRecord(
            step=step,
            samples=step * config.train.global_batch_size,
            loss=loss,
            batch_hash=f"{ids_hash % 2**64:016x}",
            learning_rate=rate,
            gradient_norm=engines.gradient_norm(engine),
            units=config.train.global_batch_size * self._task.units_per_sample,
            seconds=seconds,
            loss_scale=engines.loss_scale(engine),
            skipped=problem,
        )

    def _heed_skipped(self, record: StepRecord) -> None:
        """After a step: stops the run where too many were skipped; takes the weights back after a spike, if told to."""
        self._bad_steps.note(record.loss, record.skipped)
        reason = self._bad_steps.too_many()
        if reason:
            raise TrainingError(
                f"step {record.step}: {reason}. Start again from the last checkpoint with a lower optimizer.lr, a longer "
                "schedule.warmup_steps or train.precision=fp32, or raise train.max_skipped_steps"
            )
        roll_back = self._config.train.on_loss_spike == "roll_back" and math.isfinite(record.loss)
        if record.skipped and roll_back:
            self._watchdog.beat(slow=True)
            self._finish_save()
            state = self._checkpoints.load_newest(self._engine)
            if state and self._monitor:
                self._monitor.say(f"step {record.step}  rolled back to the weights of step {state.step}")

    def _next_micro_batches(self, batches: Iterator[Batch]) -> tuple[list[Batch], str | None]:
        """This rank's share of the next global batch, or none of it and what is wrong with a sample of it."""
        try:
            return [next(batches) for _ in range(self._micro_batches)], None
        except ValueError as error:
            return [], str(error)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Metrics over the whole validation set; every rank must call it and gets the same."""
        self._engine.eval()
        sums, first_batch = None, None
        for host_batch in self._data.validation_batches():
            self._watchdog.beat()
            batch = self._to_device(host_batch)
            first_batch = first_batch or batch
            batch_sums = self._task.validation_sums(self._engine, batch)
            sums = batch_sums if sums is None else sums + batch_sums
        assert sums is not None and first_batch is not None, "the data set's check lets no empty validation set through"
        metrics = self._task.validation_metrics(self._ranks.sum_floats(sums))
        self._watchdog.beat(slow=True)
        # All ranks make the example, since under ZeRO-3 no rank can run the model alone.
        example = self._task.example(self._engine.module, first_batch)
        if self._monitor:
            self._monitor.validation(step, metrics)
            if example:
                self._monitor.example(*example, step=step)
        return metrics

    def _stopped(self, step: int) -> Outcome:
        reasons = [reason for reason in self._ranks.gather(self._stop.reason) if reason]
        self._watchdog.beat(slow=True)
        if step > self._saved_step:
            self._save(step)
        self._finish_save()
        self._stop.done()
        return Outcome(step, reasons[0])

    def _save(self, step: int) -> None:
        self._watchdog.beat(slow=True)
        state = State(
            step=step,
            samples=step * self._config.train.global_batch_size,
            world_size=self._ranks.world_size,
            zero_stage=self._engine.zero_optimization_stage(),
            config=flatten(self._config),
            data_digest=self._data.digest,
        )
        self._finish_save()
        start = time.perf_counter()
        self._checkpoints.save(self._engine, state)
        self._saved_step, self._save_seconds = step, time.perf_counter() - start
        if not self._config.checkpoint.in_background:
            self._finish_save()

    def _finish_save(self) -> None:
        """Waits for the checkpoint under way, if there is one, and says that it is there."""
        start = time.perf_counter()
        path = self._checkpoints.finish()
        if path and self._monitor:
            seconds = self._save_seconds + time.perf_counter() - start
            self._monitor.say(f"checkpoint  {path}  held up training for {seconds:.2f} s")

    def _to_device(self, batch: Batch) -> Batch:
        device = self._ranks.device
        return {k: v if k == "sample_ids" else v.to(device, non_blocking=True) for k, v in batch.items()}

    @contextmanager
    def _clock(self, seconds: dict[str, float], part: str, step: int) -> Iterator[None]:
        """Adds the time inside to `seconds[part]`. On a GPU only the steps that are shown wait for its stream."""
        start = time.perf_counter()
        yield
        if self._ranks.device.type == "cuda" and _is_due(step, self._config.monitor.every_steps):
            torch.cuda.synchronize()
        seconds[part] += time.perf_counter() - start


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _wrap(value: int) -> int:
    """An integer of any size as the signed 64-bit integer that equals it modulo 2**64."""
    return (int(value) + 2**63) % 2**64 - 2**63
