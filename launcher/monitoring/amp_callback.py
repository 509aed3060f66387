"""`AmpWandbCallback`: the loss scale of all ranks on Weights & Biases, from rank zero."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from launcher.loggers.base import LogStep, Tracker, is_of_class
from launcher.loggers.row_queue import RowQueue
from launcher.loggers.wandb_tracker import FLUSH_TIMEOUT, WandbTracker
from launcher.monitoring.gather import Gathered
from launcher.monitoring.health import Alert, Limits
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor
from launcher.monitoring.trainer_facts import is_rank_zero
from strategies.loss_scale import LossScaleError, read_loss_scale

_log = logging.getLogger(__name__)
# Seconds that the end of an epoch may wait until W&B has its row.
_EPOCH_TIMEOUT = 0.2
# Columns whose last values belong in the summary of a run.
_SUMMARY = ("amp/precision", "amp/loss_scale", "amp/skipped_steps")


class TrackedMonitor(LossScaleMonitor):
    """Sends rows, alerts and a summary to trackers instead of the trainer's loggers. See `LossScaleMonitor`."""

    def __init__(self, trackers: Sequence[Tracker], precision: str | int | None, **options: Any) -> None:
        super().__init__(precision, **options)
        self._trackers = trackers
        self._batch = 0
        self._last_step = LogStep(0, 0)
        self._summary: dict[str, Any] = {}

    @override
    def observe(self, gathered: Gathered) -> None:
        self._batch = gathered.batch

    @override
    def write(self, trainer: Any, row: Mapping[str, Any], step: int) -> None:
        precision = self._precision_of(trainer)
        full = {"amp/enabled": True, "amp/precision": None if precision is None else str(precision), **row}
        self._summary = {name: full[name] for name in _SUMMARY if name in full}
        self._last_step = LogStep(step, self._batch)
        for tracker in self._trackers:
            tracker.log_row(full, self._last_step)

    @override
    def alert(self, alert: Alert, step: int) -> None:
        super().alert(alert, step)
        for tracker in self._trackers:
            tracker.alert(alert.kind, alert.title, alert.text, LogStep(step, self._batch))

    @override
    def finish(self, trainer: Any) -> None:
        if is_rank_zero(trainer) and self._summary:
            self._summarize(self._summary)

    def _report_arrived(self, trainer: Any, timeout: float) -> None:
        """Report what the ranks have sent so far, waiting at most `timeout` seconds for it."""
        if is_rank_zero(trainer) and self._is_active(trainer):
            self._exchange.wait(timeout)
            for gathered in self._exchange.take():
                self._report(trainer, gathered)

    def _summarize(self, values: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.summarize(values, self._last_step)
            tracker.finish()


class AmpWandbCallback(TrackedMonitor):
    """Logs `amp/enabled`, `amp/precision`, the loss scale of all ranks and their speed to the current W&B run.

    Rows carry their true step as `trainer/global_step`, and alerts go to W&B's own. A stalled or failing W&B costs
    rows, which are counted, and never a step. Without a W&B run nothing is logged.

    Args:
        enabled: False logs nothing at all; the same on every rank, as all take part in the exchange.
        precision: any spelling; logged as given. None takes the trainer's.
        every_n_steps: optimizer steps between two rows; None takes the trainer's `log_every_n_steps`.
        limits: thresholds of the alerts.
        count_skipped: see `LossScaleMonitor`.
        on_alert: receives alerts in addition to W&B.
        on_notice: receives what does not work with W&B, and how many rows were dropped; None logs a warning.
        capacity: rows that may wait for W&B.
        writer: queue shared with other writers and closed by its owner; None makes one.
        group: process group of the ranks; None for all.

    Raises:
        PrecisionError: `precision` is not valid.
    """

    def __init__(
        self,
        enabled: bool = True,
        precision: str | int | None = None,
        *,
        every_n_steps: int | None = None,
        limits: Limits | None = None,
        count_skipped: bool = True,
        on_alert: Callable[[Alert, int], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
        capacity: int = 256,
        writer: RowQueue | None = None,
        group: Any = None,
    ) -> None:
        self._tracker = WandbTracker(on_notice or _log.warning, writer, capacity)
        super().__init__(
            [self._tracker],
            precision,
            every_n_steps=every_n_steps,
            limits=limits,
            count_skipped=count_skipped,
            on_alert=on_alert,
            group=group,
        )
        self.enabled = enabled
        self._is_stalled = False

    @property
    def dropped(self) -> int:
        """Rows and alerts that W&B did not accept."""
        return self._tracker.dropped

    def get_loss_scale(self, trainer: Any) -> float | None:
        """Return the loss scale now; waits for the device.

        Args:
            trainer: a Trainer, or an object with `strategy.precision_plugin.scaler`.

        Returns:
            None if nothing scales the loss, or if the scale cannot be read.
        """
        if not self.watches(trainer):
            return None
        try:
            sample = read_loss_scale(trainer)
        except LossScaleError:
            return None
        return None if sample is None else sample.scale

    # The name that an earlier system's callers use.
    _get_loss_scale = get_loss_scale

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Sample the epoch's end, and give W&B a short time to accept the row: callers may look at the run next."""
        is_behind = self._is_stalled and not self.flush(0)
        super().on_train_epoch_end(trainer, pl_module)
        # A W&B that stalls costs the wait once, not at each epoch.
        if not is_behind:
            deadline = time.monotonic() + _EPOCH_TIMEOUT
            self._report_arrived(trainer, _EPOCH_TIMEOUT)
            self._is_stalled = not self.flush(max(deadline - time.monotonic(), 0))

    @override
    def write(self, trainer: Any, row: Mapping[str, Any], step: int) -> None:
        # Lightning's logger lets W&B count, from the training's thread, while this row waits in the queue.
        self._tracker.shares_run = any(is_of_class(each, "WandbLogger") for each in getattr(trainer, "loggers", ()))
        super().write(trainer, row, step)

    @override
    def finish(self, trainer: Any) -> None:
        super().finish(trainer)
        # The owner of a shared queue closes it later.
        self.flush(_EPOCH_TIMEOUT)

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Wait up to `timeout` seconds until W&B has what was logged so far; return whether it has."""
        return self._tracker.flush(timeout)

    @override
    def _is_active(self, trainer: Any) -> bool:
        return self.enabled and super()._is_active(trainer)
