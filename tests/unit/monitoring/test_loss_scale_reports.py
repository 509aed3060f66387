"""`launcher.monitoring.loss_scale_monitor`: the receivers and the time of a report; with plain trainers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.monitoring.gather import Gathered
from launcher.monitoring.health import Alert
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor
from launcher.monitoring.samples import RankSample
from tests.support.amp_steps import Rows, batches, written
from tests.support.plain_trainer import FixedScaler, plain_trainer


class Logger:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.logged: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self.error is not None:
            raise self.error
        self.logged.append((metrics, step))


def test_every_logger_gets_plain_numbers_and_one_that_raises_does_not_stop_the_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = Logger()
    trainer = plain_trainer(FixedScaler(8.0), epoch=2, loggers=[Logger(OSError("disk full")), good])
    batches(LossScaleMonitor("16", every_n_steps=3), trainer, 3)
    ((metrics, step),) = good.logged
    assert (step, metrics["amp/loss_scale"], metrics["epoch"], metrics["amp/overflow"]) == (3, 8.0, 2.0, 0.0)
    assert {type(value) for value in metrics.values()} == {float}
    assert caplog.messages == ["Logger did not accept the loss scale: disk full"]


def test_without_a_logger_nothing_is_written() -> None:
    batches(LossScaleMonitor("16", every_n_steps=1), plain_trainer(FixedScaler(8.0), loggers=None), 1)


@pytest.mark.case(39)
@pytest.mark.parametrize(
    ("place", "logs"),
    [({}, True), ({"is_global_zero": True, "global_rank": 1}, True), ({"is_global_zero": False}, False),
     ({"global_rank": 0}, True), ({"global_rank": 1}, False)],
)  # fmt: skip
def test_only_rank_zero_logs(place: dict[str, Any], logs: bool) -> None:
    monitor = Rows("16", every_n_steps=1)
    batches(monitor, plain_trainer(FixedScaler(8.0), **place), 1)
    assert bool(monitor.rows) is logs


def test_each_kind_of_alert_is_reported_once_per_occurrence() -> None:
    reported: list[tuple[str, int]] = []

    def report(alert: Alert, step: int) -> None:
        reported.append((alert.kind, step))

    scaler = FixedScaler(0.0)
    monitor, trainer = Rows("16", every_n_steps=1, on_alert=report), plain_trainer(scaler)
    batches(monitor, trainer, 1, 2)
    batches(monitor, trainer, 3, outputs=torch.tensor(math.nan))
    scaler.scale = 8.0
    batches(monitor, trainer, 4)
    scaler.scale = 0.0
    batches(monitor, trainer, 5)
    assert reported == [("scale_underflow", 1), ("loss_not_finite", 3), ("scale_underflow", 5)]


class PendingSamples:
    """Several ranks' samples; each arrives when the next is sent, or on `wait`."""

    world_size, rank = 2, 0

    def __init__(self) -> None:
        self.sent: list[tuple[int, Any, dict[str, Any]]] = []
        self.arrived = 0

    def send(self, step: int, epoch: int | None, values: dict[str, Any], batch: int) -> None:
        self.sent.append((step, epoch, values))

    def take(self, *, wait: bool = False) -> list[Gathered]:
        begun, self.arrived = self.arrived, len(self.sent) if wait else max(len(self.sent) - 1, self.arrived)
        return [
            Gathered(step, epoch, tuple(RankSample(rank, values["scale"]) for rank in range(2)))
            for step, epoch, values in self.sent[begun : self.arrived]
        ]


@pytest.mark.parametrize(("is_zero", "rows"), [(True, [1, 2, 3, 4]), (False, [])])
def test_late_samples_are_reported_with_their_step_and_the_end_waits_for_the_last(
    is_zero: bool, rows: list[int]
) -> None:
    scaler = FixedScaler(0.0)
    monitor, trainer = Rows("16", every_n_steps=1), plain_trainer(scaler, is_global_zero=is_zero)
    monitor._exchange = exchange = PendingSamples()  # type: ignore[assignment]
    for step in range(1, 5):
        scaler.scale = float(2**step)
        batches(monitor, trainer, step)
        assert written(monitor) == rows[: max(step - 2, 0)]
    assert exchange.arrived == 2
    monitor.on_train_end(trainer, None)
    assert (written(monitor), exchange.arrived) == (rows, 4)
    assert [row["amp/loss_scale"] for _, row in monitor.rows] == [2.0**step for step in rows]


@pytest.mark.case(37)
def test_pending_samples_are_awaited_at_the_end_and_dropped_after_an_exception() -> None:
    for end, rows in (("on_train_end", [4]), ("on_exception", [])):
        monitor, trainer = Rows("16"), plain_trainer()
        monitor._exchange.send(4, 0, {"has_scale": 0.0, "loss_not_finite": 0.0})
        getattr(monitor, end)(trainer, None, *([ValueError()] if end == "on_exception" else []))
        assert (written(monitor), monitor.finished) == (rows, [trainer])
        assert monitor._exchange.take(wait=True) == []


@pytest.mark.case(10)
def test_of_several_only_the_first_takes_part() -> None:
    first, second = Rows("16", every_n_steps=1), Rows("16", every_n_steps=1)
    trainer = plain_trainer(FixedScaler(8.0), callbacks=[SimpleNamespace(), first, second])
    for monitor in (first, second):
        batches(monitor, trainer, 1)
        monitor.on_train_epoch_end(trainer, None)
        monitor.on_train_end(trainer, None)
        monitor.on_exception(trainer, None, ValueError())
    assert (written(first), written(second), len(first.finished), second.finished) == ([1], [], 2, [])
