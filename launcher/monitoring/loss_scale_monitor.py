"""A Lightning callback that monitors the loss scale and the speed of all ranks, in any Trainer.

It needs torch and `lightning` or `pytorch_lightning`, and no run of the launcher.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from launcher.monitoring.batch_size import count_batch
from launcher.monitoring.gather import Gathered, SampleExchange
from launcher.monitoring.health import Alert, Health, Limits, judge
from launcher.monitoring.samples import ABSENT
from launcher.monitoring.step_timer import StepClock
from launcher.monitoring.trainer_facts import (
    attribute,
    is_rank_zero,
    logger_step,
    loss_not_finite,
    loss_of,
    peak_memory,
    steps_done,
)
from strategies.loss_scale import CountingGradScaler, LiveScale, LossScaleError, find_loss_scale
from strategies.precision_names import DTYPE, PrecisionError, normalize_precision

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        # The package's other name, and the only one up to 1.9.
        from pytorch_lightning import Callback

_log = logging.getLogger(__name__)
_DEFAULT_INTERVAL = 50


class LossScaleMonitor(Callback):
    """Gathers every rank's loss scale, skipped steps, step time and memory, and logs them from rank zero.

    One small collective at each logging interval, started there and read at the next one: no step waits for it, and
    the steps between have neither a collective nor a host sync. Metrics go to the trainer's loggers: `amp/loss_scale`
    and its `_min` and `_max` over the ranks, `amp/skipped_steps`, `amp/skip_rate`, `amp/growth_tracker`,
    `amp/floor_steps`, `amp/ranks_diverged`, `perf/step_seconds`, `perf/data_seconds`, `perf/slowest_rank`,
    `perf/slowest_factor`, `perf/peak_memory_bytes`, `perf/samples_per_second` and `perf/tokens_per_second`. Of several
    in one trainer only the first is active.

    Args:
        precision: any spelling; None takes the trainer's. The loss scale is read in fp16 only.
        every_n_steps: optimizer steps between two samples; None takes the trainer's `log_every_n_steps`.
        limits: thresholds of the alerts.
        count_skipped: replace torch's GradScaler with one that counts skipped steps, when the fit begins.
        on_alert: called on rank zero, once per occurrence of a problem; None logs a warning instead.
        group: process group of the ranks; None for all.

    Raises:
        PrecisionError: `precision` is not valid.
    """

    def __init__(
        self,
        precision: str | int | None = None,
        *,
        every_n_steps: int | None = None,
        limits: Limits | None = None,
        count_skipped: bool = True,
        on_alert: Callable[[Alert, int], None] | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        if precision is not None:
            normalize_precision(precision)
        self.enabled = True
        self.precision = precision
        self.every_n_steps = every_n_steps
        self.limits = limits or Limits()
        self._count_skipped = count_skipped
        self._on_alert = on_alert
        self._exchange = SampleExchange(group)
        self._clock = StepClock()
        self._samples = self._tokens = 0  # since the last sample was sent
        self._health = Health(0)
        self._raised: frozenset[str] = frozenset()
        self._passed_step = -1
        self._sampled_step = -1
        self._loss: Any = None
        self._is_scale_error_reported = False

    # Hooks that Lightning calls.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Install the counting scaler, before a checkpoint is loaded into it."""
        plugin = attribute(attribute(trainer, "strategy"), "precision_plugin")
        scaler = attribute(plugin, "scaler")
        # A subclass keeps its own behavior.
        plain = type(scaler) in (torch.amp.GradScaler, torch.cuda.amp.GradScaler)
        if stage == "fit" and self._count_skipped and plain and scaler.is_enabled() and self._is_active(trainer):
            plugin.scaler = CountingGradScaler.adopt(scaler, self.limits.floor)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start counting."""
        self._passed_step = self._sampled_step = steps_done(trainer)
        self._loss = None
        self._health = Health(steps_done(trainer))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Begin to time the batch."""
        self._clock.batch_begins(attribute(pl_module, "device"))
        samples, tokens = count_batch(batch)
        self._samples += samples
        self._tokens += tokens

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Time the forward pass."""
        self._clock.backward_begins()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """At the interval: report the last sample, and send the next."""
        self._clock.batch_ends()
        self._loss = loss_of(outputs)
        step, passed = steps_done(trainer), self._passed_step
        self._passed_step = step
        interval = self._interval(trainer)
        # Manual optimization may move by several steps at once.
        if step // interval > max(passed, 0) // interval:
            self._sample(trainer, logger_step(trainer, is_epoch_end=False))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Sample the end of each epoch, independent of the interval."""
        if steps_done(trainer) != self._sampled_step:
            self._sample(trainer, logger_step(trainer, is_epoch_end=True))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Leave the validation out of the step time."""
        self._clock.pause()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the validation out of the step time."""
        self._clock.pause()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Leave the checkpoint out of the step time."""
        self._clock.pause()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the samples that are being gathered, and report them."""
        if self._is_active(trainer):
            for gathered in self._exchange.take(wait=True):
                self._report(trainer, gathered)
            self.finish(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Discard the samples that are being gathered: the other ranks may never send theirs."""
        if self._is_active(trainer):
            self._exchange.drop()
            self.finish(trainer)

    # Methods that a subclass may override.

    def write(self, trainer: Any, row: Mapping[str, Any], step: int) -> None:
        """Log a row on rank zero: metrics by name, taken after `step` optimizer steps."""
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        for logger in attribute(trainer, "loggers") or ():
            try:
                logger.log_metrics(numbers, step=step)
            except Exception as error:  # noqa: BLE001 -- a logger raises anything, and may not stop a training
                _log.warning("%s did not accept the loss scale: %s", type(logger).__name__, error)

    def observe(self, gathered: Gathered) -> None:
        """Receive every rank's own numbers, on rank zero, before they are written as one row."""

    def alert(self, alert: Alert, step: int) -> None:
        """Report a problem on rank zero, after `step` optimizer steps."""
        if self._on_alert is not None:
            self._on_alert(alert, step)
            return
        _log.warning("step %d: %s: %s", step, alert.title, alert.text)

    def finish(self, trainer: Any) -> None:
        """End the monitoring, whether the training succeeded or failed; called on every rank."""

    def watches(self, trainer: Any) -> bool:
        """Whether the loss scale is read: only fp16 has one."""
        try:
            return DTYPE[normalize_precision(self._precision_of(trainer))] == "fp16"
        except PrecisionError:
            return True

    def _precision_of(self, trainer: Any) -> Any:
        return self.precision if self.precision is not None else attribute(trainer, "precision")

    def _is_active(self, trainer: Any) -> bool:
        """Whether this is the first enabled monitor of the trainer: only that one gathers and logs."""
        others = attribute(trainer, "callbacks") or ()
        return next((c for c in others if isinstance(c, LossScaleMonitor) and c.enabled), self) is self

    def _interval(self, trainer: Any) -> int:
        interval = self.every_n_steps or attribute(trainer, "log_every_n_steps")
        return interval if isinstance(interval, int) and interval > 0 else _DEFAULT_INTERVAL

    def _sample(self, trainer: Any, batch: int) -> None:
        if not self._is_active(trainer):
            return
        try:
            self._send_sample(trainer, batch)
        except RuntimeError:
            if self._exchange.world_size == 1:
                raise
            # torch's error for a lost rank. The training's next collective raises it too, when the hooks of this
            # step's end have run.
            self._exchange.drop()

    def _send_sample(self, trainer: Any, batch: int) -> None:
        step = steps_done(trainer)
        for gathered in self._exchange.take():
            self._report(trainer, gathered)
        steps = step - max(self._sampled_step, 0)
        times = self._clock.read(steps)
        self._sampled_step = step
        values: dict[str, float | Tensor] = {
            "has_scale": 0.0,
            "loss_not_finite": loss_not_finite(self._loss),
            "step_seconds": times.step,
            "data_seconds": times.data,
            "own_seconds": times.own,
            "peak_memory": peak_memory(),
            "samples": self._samples / max(steps, 1) or ABSENT,
            "tokens": self._tokens / max(steps, 1) or ABSENT,
        }
        self._samples = self._tokens = 0
        values.update(self._scale_values(trainer))
        self._exchange.send(step, attribute(trainer, "current_epoch"), values, batch)
        if self._exchange.world_size == 1:
            # One rank: its sample has already arrived.
            for gathered in self._exchange.take():
                self._report(trainer, gathered)

    def _scale_values(self, trainer: Any) -> dict[str, float | Tensor]:
        if not self.watches(trainer):
            return {}
        try:
            live = find_loss_scale(trainer)
        except LossScaleError as error:
            if not self._is_scale_error_reported:
                self._is_scale_error_reported = True
                _log.warning("rank %d: the loss scale is not logged: %s", self._exchange.rank, error)
            return {"has_scale": ABSENT}
        return {} if live is None else _values_of(live)

    def _report(self, trainer: Any, gathered: Gathered) -> None:
        if not gathered.samples or not is_rank_zero(trainer):
            return
        self._health = judge(gathered.samples, gathered.step, self._health, self.limits)
        self.observe(gathered)
        row: dict[str, Any] = dict(self._health.metrics)
        if gathered.epoch is not None:
            row["epoch"] = gathered.epoch
        self.write(trainer, row, gathered.step)
        raised = self._raised
        self._raised = frozenset(alert.kind for alert in self._health.alerts)
        for alert in self._health.alerts:
            if alert.kind not in raised:
                self.alert(alert, gathered.step)


def _values_of(live: LiveScale) -> dict[str, float | Tensor]:
    counts = {"skipped_steps": live.skipped_steps, "growth_tracker": live.growth_tracker,
              "floor_steps": live.floor_steps}  # fmt: skip
    return {"has_scale": 1.0, "scale": live.scale, **{name: n for name, n in counts.items() if n is not None}}
