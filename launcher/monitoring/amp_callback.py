"""`AmpWandbCallback`: the loss scale of all ranks on Weights & Biases, from rank zero."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from launcher.loggers.wandb_writer import WandbWriter, log_row
from launcher.monitoring.health import Alert, Limits
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor

_log = logging.getLogger(__name__)
# Seconds that the end of a training waits for W&B to take the last rows.
_FLUSH_TIMEOUT = 5.0


class AmpWandbCallback(LossScaleMonitor):
    """Logs `amp/enabled`, `amp/precision`, the loss scale of all ranks and their speed to the current W&B run.

    Rows carry their true step as `trainer/global_step`, and alerts go to W&B's own. A stalled or failing W&B costs
    rows, which are counted, and never a step. Without a W&B run nothing is logged.

    Args:
        enabled: False logs nothing at all; the same on every rank, as all take part in the exchange.
        precision: any spelling; logged as given. None asks the trainer.
        every_n_steps: optimizer steps between two rows; None takes the trainer's `log_every_n_steps`.
        limits: when something is wrong.
        count_skipped: see `LossScaleMonitor`.
        on_alert: told beside W&B what is wrong.
        on_notice: told what does not work with W&B, and how many rows were dropped; logged as a warning without it.
        capacity: rows that may wait for W&B.
        writer: writes to W&B together with others, and is closed by its owner; None makes one.
        group: process group of the ranks; None for all.

    Raises:
        PrecisionError: `precision` is none.
    """

    # Whether others log to the same run from another thread.
    _at_next = False

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
        writer: WandbWriter | None = None,
        group: Any = None,
    ) -> None:
        super().__init__(
            precision,
            every_n_steps=every_n_steps,
            limits=limits,
            count_skipped=count_skipped,
            on_alert=on_alert,
            group=group,
        )
        self.enabled = enabled
        self._notice = on_notice or _log.warning
        self._capacity = capacity
        self._writer = writer
        self._is_owner = writer is None
        self._told_missing = False
        self._defined = False
        self._last: dict[str, Any] = {}

    @property
    def dropped(self) -> int:
        """Rows and alerts that W&B did not take."""
        return 0 if self._writer is None else self._writer.dropped

    @override
    def _is_active(self, trainer: Any) -> bool:
        return self.enabled and super()._is_active(trainer)

    @override
    def write(self, trainer: Any, row: Mapping[str, Any], step: int) -> None:
        precision = self._precision_of(trainer)
        full = {"amp/enabled": True, "amp/precision": None if precision is None else str(precision), **row}
        if self.dropped:
            full["amp/dropped_rows"] = self.dropped
        # What the summary of the run shall hold at its end.
        kept = ("amp/precision", "amp/loss_scale", "amp/skipped_steps")
        self._last = {name: full[name] for name in kept if name in full}
        wandb = self._wandb()
        if wandb is not None:
            # Lightning's logger lets W&B count, from the training's thread, while this row waits for its own.
            at_next = self._at_next or _has_wandb_logger(trainer)
            self._put(lambda: self._log(wandb, full, step, at_next))

    @override
    def alert(self, alert: Alert, step: int) -> None:
        super().alert(alert, step)
        wandb = self._wandb()
        if wandb is not None:
            self._put(lambda: wandb.alert(title=alert.title, text=f"step {step}: {alert.text}", level="WARN"))

    @override
    def finish(self, trainer: Any) -> None:
        writer = self._writer
        if writer is None:
            return
        wandb = self._wandb()
        if wandb is not None:
            last = dict(self._last)
            self._put(lambda: wandb.run.summary.update(last))
        dropped = writer.close(_FLUSH_TIMEOUT) if self._is_owner else 0
        if dropped:
            self._notice(
                f"W&B did not take {dropped} of the loss scale's rows and alerts; the training was not held up"
            )

    def flush(self, timeout: float = _FLUSH_TIMEOUT) -> bool:
        """Wait until W&B has what was logged so far; whether it has.

        Args:
            timeout: seconds.
        """
        return self._writer is None or self._writer.flush(timeout)

    def _wandb(self) -> Any:
        """The module with a run to log to, or None."""
        try:
            import wandb

            run = wandb.run
        # Without an installation a folder `wandb/` of old runs is a module with no `run`.
        except Exception as error:  # noqa: BLE001 -- a broken installation raises anything; told, and trained without
            if not self._told_missing:
                self._told_missing = True
                self._notice(f"the loss scale is not logged: {error}; pip install wandb")
            return None
        return None if run is None else wandb

    def _put(self, write: Callable[[], None]) -> None:
        if self._writer is None:
            self._writer = WandbWriter(self._capacity)
        self._writer.put(write)

    def _log(self, wandb: Any, row: Mapping[str, Any], step: int, at_next: bool) -> None:
        if not self._defined:
            self._defined = True
            # Charts against the true step, also where no logger of Lightning's has asked for it. Only a nicety.
            with contextlib.suppress(Exception):
                for name in ("amp/*", "perf/*"):
                    wandb.define_metric(name, step_metric="trainer/global_step")
        log_row(wandb, row, step, at_next=at_next)


def _has_wandb_logger(trainer: Any) -> bool:
    """Whether a `WandbLogger` writes too: of lightning, pytorch_lightning, or a class made of one."""
    bases = (base for logger in getattr(trainer, "loggers", ()) for base in type(logger).__mro__)
    return any(base.__name__ == "WandbLogger" for base in bases)
