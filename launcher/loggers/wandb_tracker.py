"""Weights & Biases as a tracker: the current W&B run of this process, written by a background thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from launcher.loggers.base import LogStep, Tracker
from launcher.loggers.row_queue import RowQueue

# Seconds that the end of a training waits for W&B to accept the last rows.
FLUSH_TIMEOUT = 5.0


class WandbTracker(Tracker):
    """Logs to `wandb.run`, which may have begun anywhere. Without a W&B run nothing is logged.

    Rows have their true step as `trainer/global_step`, and alerts are sent as W&B alerts.

    Args:
        notice: receives what does not work with W&B, and how many rows were dropped.
        queue: shared with other writers and closed by its owner; None makes one.
    """

    def __init__(self, notice: Callable[[str], None], queue: RowQueue | None = None, capacity: int = 256) -> None:
        self.queue = queue
        # Whether others log to the same W&B run from another thread.
        self.shares_run = queue is not None
        self._owns_queue = queue is None
        self._capacity = capacity
        self._notice = notice
        self._is_missing_reported = False
        self._defined = False

    @property
    def dropped(self) -> int:
        """Rows and alerts that W&B did not accept."""
        return 0 if self.queue is None else self.queue.dropped

    @override
    def log_row(self, row: Mapping[str, Any], step: LogStep) -> None:
        full = {**row, "amp/dropped_rows": self.dropped} if self.dropped else dict(row)
        wandb = self._wandb()
        if wandb is not None:
            shares_run = self.shares_run
            self._put(lambda: self._log(wandb, full, step.optimizer_steps, shares_run))

    @override
    def alert(self, kind: str, title: str, text: str, step: LogStep) -> None:
        wandb = self._wandb()
        if wandb is not None:
            message = f"step {step.optimizer_steps}: {text}"
            self._put(lambda: wandb.alert(title=title, text=message, level="WARN"))

    @override
    def summarize(self, values: Mapping[str, Any], step: LogStep) -> None:
        wandb = self._wandb()
        if wandb is not None:
            self._put(lambda: wandb.run.summary.update(dict(values)))

    @override
    def finish(self) -> None:
        if self.queue is None or not self._owns_queue:
            return
        dropped = self.queue.close(FLUSH_TIMEOUT)
        if dropped:
            self._notice(f"W&B did not accept {dropped} rows and alerts of the loss scale; training was not delayed")

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until W&B has what was logged so far; return whether it has."""
        return self.queue is None or self.queue.flush(timeout)

    def _wandb(self) -> Any:
        """The module with a run to log to, or None."""
        try:
            import wandb

            run = wandb.run
        # Without an installation a folder `wandb/` of old runs is a module with no `run`.
        except Exception as error:  # noqa: BLE001 -- a broken installation raises anything; reported, training continues
            if not self._is_missing_reported:
                self._is_missing_reported = True
                self._notice(f"the loss scale is not logged: {error}; pip install wandb")
            return None
        return None if run is None else wandb

    def _put(self, write: Callable[[], None]) -> None:
        if self.queue is None:
            self.queue = RowQueue(self._capacity)
        self.queue.put(write)

    def _log(self, wandb: Any, row: Mapping[str, Any], step: int, at_next: bool) -> None:
        if not self._defined:
            self._defined = True
            # Charts against the true step, even if no Lightning logger has requested it. Optional.
            with contextlib.suppress(Exception):
                for name in ("amp/*", "perf/*"):
                    wandb.define_metric(name, step_metric="trainer/global_step")
        log_row(wandb, row, step, at_next=at_next)


def log_row(wandb: Any, row: Mapping[str, Any], step: int, *, at_next: bool = False) -> None:
    """Log one row at a step that W&B accepts.

    W&B drops a row below its own step, which Lightning's logger advances by one with each of its calls. The true step
    is in the row, and the charts are drawn against it. `at_next` lets W&B count the row as the next one: another thread
    may log a row between reading W&B's step and naming it, and this one would be dropped.
    """
    if at_next:
        wandb.log({**row, "trainer/global_step": step}, commit=True)
        return
    current = getattr(wandb.run, "step", None)
    at = step if not isinstance(current, int) or step >= current else current + 1
    # At once: W&B keeps a row with a step open, and would add Lightning's next row to it, with another true step.
    wandb.log({**row, "trainer/global_step": step}, step=at, commit=True)
