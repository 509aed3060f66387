"""Drives `AmpWandbCallback` and its monitor with plain trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from launcher import AmpWandbCallback
from launcher.monitoring.gather import Gathered
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor
from launcher.monitoring.samples import RankSample
from tests.support.wandb_stand_in import RecordingWandb

# Seconds; only a fault takes as long.
LONG = 60.0


def callback(precision: str | int | None = "16", **options: Any) -> AmpWandbCallback:
    return AmpWandbCallback(True, precision, **{"every_n_steps": 1, **options})


def steps(amp: AmpWandbCallback, trainer: Any, *numbers: int) -> None:
    """End these optimizer steps and wait until W&B has the logged rows."""
    for number in numbers or (trainer.global_step,):
        trainer.global_step = number
        amp.on_train_batch_end(trainer, None, None, None, 0)
    assert amp.flush(LONG)


def only_row(wandb: RecordingWandb) -> dict[str, Any]:
    ((_, row),) = wandb.rows
    return row


class Rows(LossScaleMonitor):
    """Keeps the rows in memory."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.samples: list[RankSample] = []
        self.finished: list[Any] = []

    @override
    def write(self, trainer: Any, row: Mapping[str, Any], step: int) -> None:
        self.rows.append((step, dict(row)))

    @override
    def observe(self, gathered: Gathered) -> None:
        self.samples += gathered.samples

    @override
    def finish(self, trainer: Any) -> None:
        self.finished.append(trainer)


def batches(monitor: LossScaleMonitor, trainer: Any, *steps: int, outputs: Any = None) -> None:
    """End a batch at each of these steps."""
    for step in steps:
        trainer.global_step = step
        monitor.on_train_batch_end(trainer, None, outputs, None, 0)


def written(monitor: Rows) -> list[int]:
    return [step for step, _ in monitor.rows]
