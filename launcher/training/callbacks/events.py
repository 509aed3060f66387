"""The progress of a training as events in the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from launcher.core.errors import Interrupted
from launcher.core.events import EventLog
from launcher.training.callbacks.progress import as_numbers, logging_interval
from launcher.training.callbacks.time_account import TimeAccount

# Layer-wise learning rates can be many; the first ones show the schedule.
_RATES_IN_EVENT = 8


class EventWriter(pl.Callback):
    """Writes rank zero's events: steps at the logging interval, validations, checkpoints.

    `check_metrics`, if it is set, receives the metrics of steps and epochs, which are read for the events anyway.
    The events also have what the time was spent on.
    `after_write` delays an action until the checkpoint that is being saved is complete, if it is written in the
    background.
    """

    def __init__(self, events: EventLog, after_write: Callable[[Callable[[], None]], None] = lambda act: act()) -> None:
        self._events = events
        self._account = TimeAccount()
        self._after_write = after_write
        self.batches = 0  # trained by this process
        self.check_metrics: Callable[[Mapping[str, float], int], None] | None = None
        self._step = -1
        self._since: tuple[float, int] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._account.start(trainer)
            self._events.write("training_started", step=trainer.global_step, epoch=trainer.current_epoch)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning computes the metrics of an epoch after its `on_train_epoch_end`.
        if self.batches:
            self._write_epoch(trainer, trainer.current_epoch - 1)

    def _write_epoch(self, trainer: pl.Trainer, epoch: int) -> None:
        if trainer.is_global_zero and trainer.logged_metrics:
            metrics = as_numbers(trainer.logged_metrics)
            self._events.write("epoch", step=trainer.global_step, epoch=epoch, metrics=metrics)
            self._check(metrics, trainer.global_step)

    def _check(self, metrics: Mapping[str, float], step: int) -> None:
        if self.check_metrics is not None:
            self.check_metrics(metrics, step)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._account.batch_begins()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        step = trainer.global_step
        if step == self._step or not trainer.is_global_zero:
            return
        self._step = step
        if self._since is None:
            # The first step includes the warm-up; speed is measured from its end.
            self._since = (time.perf_counter(), step)
            # With its metrics: the training may end before the first logging interval.
            self._events.write("first_step", step=step, metrics=as_numbers(trainer.logged_metrics),
                               learning_rate=learning_rates(trainer), spent=self._account.read())  # fmt: skip
        elif step % logging_interval(trainer) == 0:
            now = time.perf_counter()
            before, before_step = self._since
            self._since = (now, step)
            seconds = (now - before) / max(step - before_step, 1)
            metrics = as_numbers(trainer.logged_metrics)
            self._events.write("step", step=step, epoch=trainer.current_epoch, seconds_per_step=seconds,
                               metrics=metrics, learning_rate=learning_rates(trainer),
                               spent=self._account.read())  # fmt: skip
            self._check(metrics, step)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:
            step, epoch = trainer.global_step, trainer.current_epoch
            # Without `spent`, which another thread may not read: the next event has it.
            self._after_write(lambda: self._events.write("checkpoint", step=step, epoch=epoch))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._events.write("validation", step=trainer.global_step, metrics=as_numbers(trainer.callback_metrics),
                               spent=self._account.read())  # fmt: skip
        self._since = None if self._since is None else (time.perf_counter(), trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batches:
            self._write_epoch(trainer, max(trainer.current_epoch - 1, 0))
        if trainer.is_global_zero:
            self._events.write("training_ended", step=trainer.global_step, epoch=trainer.current_epoch)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_account(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # After another exception it is not known how long the failed step has waited for a rank that hangs.
        if isinstance(exception, Interrupted):
            self._end_account(trainer)
        self._account.stop()

    def _end_account(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self._step >= 0:
            self._events.write("time_spent", step=trainer.global_step, spent=self._account.read())
        self._account.stop()


def learning_rates(trainer: pl.Trainer) -> list[float]:
    """The learning rates of the next step, in the order of the parameter groups; equal rates are listed once."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return list(dict.fromkeys(float(group["lr"]) for group in groups if "lr" in group))[:_RATES_IN_EVENT]
