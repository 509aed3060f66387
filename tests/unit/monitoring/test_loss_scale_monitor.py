"""`launcher.monitoring.loss_scale_monitor`: when it samples, and the content of a sample; with plain trainers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.monitoring.health import Limits
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor
from strategies.loss_scale import CountingGradScaler
from tests.support.amp_steps import Rows, batches, written
from tests.support.plain_trainer import FixedScaler, RaisingScaler, plain_trainer

# When it samples.


@pytest.mark.parametrize(
    ("own", "trainers", "expected"),
    [(20, 50, [20, 40]), (None, 15, [15, 30, 45]), (0, 15, [15, 30, 45]), (None, None, [50]), (None, "5", [50]),
     (-2, 4, [50]), (None, 0, [50])],
)  # fmt: skip
def test_the_interval_is_the_argument_then_the_trainers_then_fifty(
    own: Any, trainers: Any, expected: list[int]
) -> None:
    monitor, trainer = Rows("16", every_n_steps=own), plain_trainer(log_every_n_steps=trainers)
    batches(monitor, trainer, *range(1, 56))
    assert written(monitor) == expected


def test_by_default_a_sample_is_taken_each_fifty_steps() -> None:
    monitor, trainer = Rows("16"), plain_trainer()
    batches(monitor, trainer, *range(1, 151))
    assert written(monitor) == [50, 100, 150]


def test_accumulated_batches_of_one_step_are_one_sample() -> None:
    monitor, trainer = Rows("16", every_n_steps=2), plain_trainer()
    batches(monitor, trainer, 0, 0, 1, 1, 2, 2, 2, 3, 4)
    assert written(monitor) == [2, 4]


def test_steps_that_jump_over_the_interval_are_sampled_once() -> None:
    # Manual optimization with several optimizers.
    monitor, trainer = Rows("16", every_n_steps=5), plain_trainer()
    batches(monitor, trainer, 3, 6, 9, 12, 27)
    assert written(monitor) == [6, 12, 27]


def test_a_resumed_training_counts_from_where_it_is() -> None:
    monitor, trainer = Rows("16", every_n_steps=5), plain_trainer(FixedScaler(8.0), step=103)
    monitor.on_train_start(trainer, None)
    batches(monitor, trainer, 104, 105)
    assert written(monitor) == [105]


def test_an_epochs_end_is_logged_once_wherever_the_interval_is() -> None:
    monitor, trainer = Rows("16", every_n_steps=4), plain_trainer()
    batches(monitor, trainer, 1, 2, 3, 4)
    monitor.on_train_epoch_end(trainer, None)
    batches(monitor, trainer, 5, 6)
    monitor.on_train_epoch_end(trainer, None)
    monitor.on_train_epoch_end(trainer, None)
    batches(monitor, trainer, 7, 8)
    assert written(monitor) == [4, 6, 8]


def test_a_first_step_without_a_begin_is_logged_at_the_epochs_end() -> None:
    monitor = Rows("16", every_n_steps=5)
    monitor.on_train_epoch_end(plain_trainer(step=1), None)
    assert written(monitor) == [1]


def test_a_trainer_without_steps_is_logged_at_the_epochs_end() -> None:
    monitor = Rows("16", every_n_steps=1)
    monitor.on_train_batch_end(object(), None, None, None, 0)
    assert written(monitor) == []
    monitor.on_train_epoch_end(object(), None)
    assert written(monitor) == [0]


# Content of a sample.


def test_times_are_means_since_the_last_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monitor, trainer = Rows("16", every_n_steps=2), plain_trainer(step=10)
    monkeypatch.setattr(monitor._clock, "_now", lambda: now[0])

    def batch(step: int, data: float = 1.0) -> None:
        now[0] += data
        monitor.on_train_batch_start(trainer, None, None, 0)
        now[0] += 2
        monitor.on_before_backward(trainer, None, None)
        now[0] += 3
        batches(monitor, trainer, step)

    monitor.on_train_start(trainer, None)
    batch(11)
    batch(12)
    for pause in (monitor.on_validation_start, monitor.on_validation_end):
        pause(trainer, None)
        batch(13)
        monitor.on_save_checkpoint(trainer, None, {})
        now[0] += 100
        batch(14)
    first, second = monitor.rows[0][1], monitor.samples[1]
    assert (first["perf/step_seconds"], first["perf/data_seconds"]) == (11 / 2, 1 / 2)
    assert monitor.samples[0].own_seconds == 5 / 2
    assert (second.step_seconds, second.data_seconds, second.own_seconds) == (5, 0, 2)


def test_the_first_times_are_means_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monitor, trainer = Rows("16", every_n_steps=4), plain_trainer(step=0)
    monkeypatch.setattr(monitor._clock, "_now", lambda: now[0])
    monitor.on_train_start(trainer, None)
    for step in range(1, 5):
        monitor.on_train_batch_start(trainer, None, None, 0)
        now[0] += 3
        batches(monitor, trainer, step)
    assert monitor.samples[0].step_seconds == 3


def test_the_clock_gets_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = LossScaleMonitor("16")
    devices: list[Any] = []
    monkeypatch.setattr(monitor._clock, "batch_begins", devices.append)
    monitor.on_train_batch_start(plain_trainer(), SimpleNamespace(device="the device"), None, 0)
    monitor.on_train_batch_start(plain_trainer(), None, None, 0)
    assert devices == ["the device", None]


@pytest.mark.parametrize(
    ("outputs", "broken"),
    [
        ({"loss": torch.tensor(1.0)}, False),
        ({"loss": torch.tensor(math.nan)}, True),
        ({"loss": torch.tensor(math.inf, requires_grad=True)}, True),
        (torch.tensor([1.0, math.inf]), True),
        (torch.tensor(3), False),
        ({"loss": None}, False),
        ({}, False),
        (None, False),
        ("nan", False),
    ],
)
def test_a_loss_that_is_not_finite_is_detected(outputs: Any, broken: bool) -> None:
    monitor = Rows("16", every_n_steps=1)
    batches(monitor, plain_trainer(), 1, outputs=outputs)
    assert monitor.samples[0].loss_not_finite is broken


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_loss_that_is_not_finite_is_detected_at_the_end_of_an_epoch_shorter_than_the_interval(steps: int) -> None:
    monitor, trainer = Rows("16", every_n_steps=50), plain_trainer()
    for step in range(1, steps + 1):
        batches(monitor, trainer, step, outputs=torch.tensor(math.nan))
    monitor.on_train_epoch_end(trainer, None)
    assert [sample.loss_not_finite for sample in monitor.samples] == [True]


def test_the_memory_is_that_of_the_process_without_a_gpu() -> None:
    import resource

    monitor = Rows("16", every_n_steps=1)
    batches(monitor, plain_trainer(), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.5 * peak < monitor.samples[0].peak_memory <= peak


def test_the_memory_is_that_of_the_gpu_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    monitor = Rows("16", every_n_steps=1)
    for ready, expected in ((False, False), (True, True)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda ready=ready: ready)
        batches(monitor, plain_trainer(), 1 + ready)
        assert (monitor.samples[-1].peak_memory == 123) is expected


def test_a_scaler_that_recovers_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    monitor, trainer = Rows("16", every_n_steps=1), plain_trainer(RaisingScaler(RuntimeError("gone")))
    batches(monitor, trainer, 1, 2)
    trainer.strategy.precision_plugin.scaler = FixedScaler(4.0)
    batches(monitor, trainer, 3)
    assert [row.get("amp/loss_scale") for _, row in monitor.rows] == [None, None, 4.0]
    assert len(caplog.messages) == 1


def test_the_counts_are_those_of_the_scaler_where_it_has_some() -> None:
    scaler = CountingGradScaler("cpu", init_scale=1.0)
    counts = {"skipped_steps": 3, "overflows": 4, "floor_steps": 7}
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 5, "counts": counts})
    monitor = Rows("16", every_n_steps=2)
    batches(monitor, plain_trainer(scaler), 2)
    sample, (_, row) = monitor.samples[0], monitor.rows[0]
    assert (sample.skipped_steps, sample.growth_tracker, sample.floor_steps) == (3, 5, 7)
    assert (row["amp/skipped_steps"], row["amp/growth_tracker"], row["amp/floor_steps"]) == (3, 5, 7)


# The counting scaler.


@pytest.mark.parametrize("enabled", [True, False])
def test_torchs_scaler_is_replaced_by_one_that_counts(enabled: bool) -> None:
    plain = torch.amp.GradScaler("cpu", 256.0, enabled=enabled)
    trainer = plain_trainer(plain)
    LossScaleMonitor("16", limits=Limits(floor=2.0)).setup(trainer, None, "fit")
    scaler = trainer.strategy.precision_plugin.scaler
    assert (scaler is plain) is not enabled
    if enabled:
        assert isinstance(scaler, CountingGradScaler)
        assert (scaler.get_scale(), scaler.floor) == (256.0, 2.0)


class OwnScaler(torch.amp.GradScaler):
    """A user's subclass."""


@pytest.mark.parametrize("scaler", [OwnScaler("cpu"), CountingGradScaler("cpu"), FixedScaler(8.0), None])
def test_other_scalers_are_not_replaced(scaler: Any) -> None:
    trainer = plain_trainer(scaler)
    LossScaleMonitor("16").setup(trainer, None, "fit")
    assert trainer.strategy.precision_plugin.scaler is scaler


def test_only_the_active_monitor_replaces_the_scaler_and_only_for_a_fit() -> None:
    plain = torch.amp.GradScaler("cpu")
    trainer = plain_trainer(plain)
    LossScaleMonitor("16").setup(trainer, None, "validate")
    LossScaleMonitor("16", count_skipped=False).setup(trainer, None, "fit")
    trainer.callbacks = [LossScaleMonitor("16")]
    LossScaleMonitor("16").setup(trainer, None, "fit")
    assert trainer.strategy.precision_plugin.scaler is plain
    LossScaleMonitor("16").setup(object(), None, "fit")
