"""The progress of a training: its measurement, and lines for output that is not redrawn.

They show recent and mean speed, the time left, and the logged metrics, those with `prog_bar=True` first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from launcher.training.callbacks.progress_text import (
    SpeedMeter,
    TrainingLength,
    format_duration,
    format_mean,
    format_metrics,
    format_speed,
    order_metrics,
)

# Metrics on one line of a file.
_MOST_IN_LINE = 12


class MeasuredProgress(pl.Callback):
    """Measures the training's speed and time left by the clock `now`; a second base class is called too."""

    def __init__(self, now: Callable[[], float], **options: Any) -> None:
        super().__init__(**options)
        self._now = now
        self._meter = SpeedMeter(now)
        self._seen_step = 0
        self._epoch = self._batches_done = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._meter = SpeedMeter(self._now)
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._meter.batch_begins()

    def batch_ended(self, trainer: pl.Trainer, batch_idx: int) -> int:
        """Measure the batch and return how many optimizer steps it made."""
        steps = trainer.global_step - self._seen_step
        self._seen_step = trainer.global_step
        self._meter.batch_ends(steps)
        # At the end of an epoch the Trainer has the number of the next one already.
        self._epoch, self._batches_done = trainer.current_epoch, batch_idx + 1
        return steps

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.pause()
        super().on_validation_start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._meter.pause()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def length(self, trainer: pl.Trainer) -> TrainingLength:
        """The limits of the training, after the last batch."""
        return read_length(trainer, self._epoch, self._batches_done)

    def speed_texts(self, length: TrainingLength) -> tuple[str, str, str]:
        """Recent speed, mean speed and time left; empty while unknown."""
        recent, mean, left = self._meter.recent(), self._meter.mean(), self._meter.seconds_left(length)
        return (
            "" if recent is None else format_speed(recent),
            "" if recent is None or mean is None else format_mean(recent, mean),
            "" if left is None else f"ETA {format_duration(left)}",
        )


def read_length(trainer: pl.Trainer, epoch: int, batches_done: int) -> TrainingLength:
    """The limits of a training, after `batches_done` batches of an epoch."""
    step, batches = trainer.global_step, trainer.num_training_batches
    total = None if trainer.max_steps < 0 else trainer.max_steps
    batches_left = None
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(batches):
        batches_left = max((trainer.max_epochs - epoch) * int(batches) - batches_done, 0)
        # Several optimizers, or another number of batches in a step later, make another number of steps.
        if trainer.lightning_module.automatic_optimization and not _changes_accumulation(trainer):
            # After a resume on other ranks an epoch has another number of steps than those before it.
            every = trainer.accumulate_grad_batches
            done = math.ceil(batches / every) if batches_done == batches else batches_done // every
            steps = step + (trainer.max_epochs - epoch) * math.ceil(batches / every) - done
            total = steps if total is None else min(steps, total)
    timers = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]  # pyright: ignore[reportAttributeAccessIssue] -- set by a connector
    return TrainingLength(
        total,
        None if trainer.max_steps < 0 else max(trainer.max_steps - step, 0),
        batches_left,
        min((left for left in timers if left is not None), default=None),
    )


def _changes_accumulation(trainer: pl.Trainer) -> bool:
    schedulers: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] -- set by a connector
    return any(isinstance(each, GradientAccumulationScheduler) for each in schedulers)


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics with one element as Python numbers; reads them from the device."""
    return {k: float(v) for k, v in metrics.items() if not isinstance(v, Tensor) or v.numel() == 1}


def logging_interval(trainer: pl.Trainer) -> int:
    """Steps between two reports. Lightning sets this attribute late and does not declare it."""
    return max(getattr(trainer, "log_every_n_steps", 0), 1)


class ProgressLines(MeasuredProgress):
    """Prints one line at each logging interval and after each validation, for output that is not redrawn."""

    def __init__(self, console: Console, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(now)
        self._console = console
        self._validated: frozenset[str] = frozenset()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, step = self.batch_ended(trainer, batch_idx), trainer.global_step
        if not steps or step % logging_interval(trainer):
            return
        length = self.length(trainer)
        of = "" if length.steps is None else f"/{length.steps}"
        speed, mean, left = self.speed_texts(length)
        # Those of the last validation have their own line.
        logged = {name: value for name, value in trainer.logged_metrics.items() if name not in self._validated}
        metrics = _shown_metrics(trainer.progress_bar_metrics, logged)
        self._print(f"step {step}{of}", " ".join(filter(None, (speed, mean))), left, metrics)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            # Of this validation, unlike the metrics of the Trainer.
            results = trainer._results
            found = {} if results is None else results.metrics(on_step=False)
            metrics = _shown_metrics(found.get("pbar", {}), found.get("callback", {}))
            self._validated = frozenset(found.get("callback", {}))
            self._print(f"validation at step {trainer.global_step}", metrics)

    def _print(self, *parts: str) -> None:
        self._console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)


def _shown_metrics(in_bar: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    return format_metrics(*order_metrics(as_numbers(in_bar), as_numbers(others), _MOST_IN_LINE))
