"""`launcher.AmpWandbCallback`: the rows that it logs, with plain trainers."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from launcher import AmpWandbCallback
from launcher.monitoring.health import Alert, Limits
from strategies.precision import PrecisionError
from tests.support.amp_steps import callback, only_row, steps
from tests.support.plain_trainer import FixedScaler, RaisingScaler, plain_trainer
from tests.support.wandb_stand_in import RecordingWandb

SCALE_KEYS = {"amp/loss_scale", "amp/loss_scale_min", "amp/loss_scale_max"}


def test_a_row_has_the_scale_of_all_ranks_and_its_true_step(wandb: RecordingWandb) -> None:
    steps(callback(), plain_trainer(FixedScaler(1024.0), step=3, epoch=2))
    ((step, row),) = wandb.rows
    assert step == 3
    wanted = {"amp/enabled": True, "amp/precision": "16", "amp/loss_scale": 1024.0, "amp/loss_scale_min": 1024.0,
              "amp/loss_scale_max": 1024.0, "amp/ranks_diverged": 0, "trainer/global_step": 3, "epoch": 2}  # fmt: skip
    assert {name: row.get(name) for name in wanted} == wanted
    assert "amp/dropped_rows" not in row
    assert row["perf/peak_memory_bytes"] > 0
    assert wandb.charts == [("amp/*", "trainer/global_step"), ("perf/*", "trainer/global_step")]


@pytest.mark.case(9)
@pytest.mark.parametrize("missing", [True, False])
def test_without_an_epoch_the_row_has_the_global_step(wandb: RecordingWandb, missing: bool) -> None:
    trainer = plain_trainer(FixedScaler(8.0), step=11, epoch=None)
    if missing:
        del trainer.current_epoch
    steps(callback(), trainer)
    ((step, row),) = wandb.rows
    assert (step, row["trainer/global_step"], row["amp/loss_scale"]) == (11, 11, 8.0)
    assert "epoch" not in row


@pytest.mark.case(10)
def test_of_two_callbacks_in_one_trainer_one_logs(wandb: RecordingWandb) -> None:
    pair = [callback(), callback()]
    trainer = plain_trainer(FixedScaler(8.0), callbacks=[object(), *pair])
    for number in (1, 2):
        for amp in pair:
            steps(amp, trainer, number)
    for amp in pair:
        amp.on_train_epoch_end(trainer, None)
        amp.on_train_end(trainer, None)
    assert [step for step, _ in wandb.rows] == [1, 2]


@pytest.mark.case(10)
def test_two_trainers_in_one_process_are_independent(wandb: RecordingWandb) -> None:
    alerts: list[tuple[str, int]] = []
    one, other = (callback(on_alert=lambda alert, step: alerts.append((alert.kind, step))) for _ in range(2))
    steps(one, plain_trainer(FixedScaler(0.0)), 1, 2)
    steps(other, plain_trainer(FixedScaler(0.0)), 1)
    assert alerts == [("scale_underflow", 1), ("scale_underflow", 1)]
    assert [row["trainer/global_step"] for _, row in wandb.rows] == [1, 2, 1]
    assert one._tracker.queue is not other._tracker.queue


@pytest.mark.case(11)
@pytest.mark.parametrize("precision", ["16", 16, "16-mixed", "16_true", "fp16", None])
def test_in_fp16_the_scale_is_logged_whenever_there_is_a_scaler(wandb: RecordingWandb, precision: Any) -> None:
    steps(callback(precision), plain_trainer(FixedScaler(8.0)))
    assert only_row(wandb)["amp/loss_scale"] == 8.0
    assert only_row(wandb)["amp/precision"] == (None if precision is None else str(precision))
    steps(callback(precision), plain_trainer(None), 2)
    assert set(wandb.rows[1][1]) & SCALE_KEYS == set()


@pytest.mark.case(11)
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "32", "32-true", "bf16-true", "64-true"])
def test_in_another_precision_no_scale_is_logged_even_with_a_scaler(wandb: RecordingWandb, precision: str) -> None:
    steps(callback(precision), plain_trainer(FixedScaler(8.0)))
    row = only_row(wandb)
    assert (row["amp/enabled"], row["amp/precision"]) == (True, precision)
    assert set(row) & SCALE_KEYS == set()
    # Without a precision of the callback, the trainer's is used.
    steps(callback(None), plain_trainer(FixedScaler(8.0), step=2, precision=precision))
    assert wandb.rows[1][1]["amp/precision"] == precision
    assert set(wandb.rows[1][1]) & SCALE_KEYS == set()


def test_arguments_are_passed_to_the_monitor() -> None:
    plain = torch.amp.GradScaler("cpu")
    trainer = plain_trainer(plain)
    amp = AmpWandbCallback(True, "16", count_skipped=False, group="the ranks", limits=Limits(floor=3.0))
    amp.setup(trainer, None, "fit")
    assert trainer.strategy.precision_plugin.scaler is plain
    assert (amp._exchange._group, amp.limits.floor, amp.every_n_steps) == ("the ranks", 3.0, None)


def test_an_invalid_precision_raises() -> None:
    with pytest.raises(PrecisionError, match="'fp15'"):
        AmpWandbCallback(True, "fp15")


def test_a_trainer_whose_precision_raises_continues_training(wandb: RecordingWandb) -> None:
    class Trainer:
        global_step = 1
        strategy = plain_trainer(FixedScaler(8.0)).strategy

        @property
        def precision(self) -> str:
            raise RuntimeError("not attached")

    steps(callback(None), Trainer(), 1)
    assert (only_row(wandb)["amp/precision"], only_row(wandb)["amp/loss_scale"]) == (None, 8.0)


@pytest.mark.case(12)
def test_a_scale_of_0_is_a_row_with_0_and_an_alert(wandb: RecordingWandb) -> None:
    steps(callback(), plain_trainer(FixedScaler(0)), 1, 2, 3)
    row = wandb.rows[0][1]
    assert (row["amp/loss_scale"], type(row["amp/loss_scale"])) == (0.0, float)
    assert (row["amp/underflow"], row["amp/overflow"]) == (True, False)
    assert [title for title, _ in wandb.alerts] == ["the loss scale is 0"]


@pytest.mark.case(13)
@pytest.mark.parametrize("value", [math.inf, math.nan, torch.tensor(math.inf)])
def test_a_scale_that_is_not_finite_raises_one_alert_until_it_is_over(wandb: RecordingWandb, value: Any) -> None:
    scaler = FixedScaler(value)
    amp, trainer = callback(), plain_trainer(scaler)
    steps(amp, trainer, 1, 2, 3)
    assert [row["amp/overflow"] for _, row in wandb.rows] == [True] * 3
    assert wandb.alerts == [("the loss scale is not finite", f"step 1: {wandb.alerts[0][1].removeprefix('step 1: ')}")]
    assert wandb.alerts[0][1].startswith("step 1: rank 0: no gradient is finite")
    scaler.scale = 8.0
    steps(amp, trainer, 4)
    scaler.scale = value
    steps(amp, trainer, 5)
    assert [text.split(":")[0] for _, text in wandb.alerts] == ["step 1", "step 5"]


@pytest.mark.case(14)
@pytest.mark.case(38)
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, AttributeError, TypeError])
def test_a_scaler_that_raises_costs_the_key_and_one_warning(
    wandb: RecordingWandb, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    steps(callback(), plain_trainer(RaisingScaler(kind("broken inside"))), 1, 2, 3)
    assert len(wandb.rows) == 3
    assert all(set(row) & SCALE_KEYS == set() for _, row in wandb.rows)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    text = f"RaisingScaler.get_scale() raised {kind.__name__}: broken inside"
    assert warning.getMessage() == f"rank 0: the loss scale is not logged: {text}"


@pytest.mark.case(14)
@pytest.mark.parametrize("value", ["65536", None, [1.0]])
def test_a_scaler_that_answers_with_no_number_costs_the_key_and_one_warning(
    wandb: RecordingWandb, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    steps(callback(), plain_trainer(FixedScaler(value)), 1, 2)
    assert all(set(row) & SCALE_KEYS == set() for _, row in wandb.rows)
    assert caplog.messages == [
        f"rank 0: the loss scale is not logged: FixedScaler.get_scale() is {value!r}, not a number"
    ]


@pytest.mark.case(15)
@pytest.mark.case(16)
@pytest.mark.case(38)
@pytest.mark.parametrize("missing", ["strategy", "precision_plugin", "scaler"])
def test_without_strategy_plugin_or_scaler_there_is_no_scale_key(
    wandb: RecordingWandb, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plain_trainer(FixedScaler(8.0))
    owner = {"strategy": trainer, "precision_plugin": trainer.strategy, "scaler": trainer.strategy.precision_plugin}
    delattr(owner[missing], missing)
    steps(callback(), trainer)
    assert only_row(wandb)["amp/enabled"] is True
    assert [name for name in only_row(wandb) if name.startswith("amp/")] == ["amp/enabled", "amp/precision"]
    assert caplog.messages == []


@pytest.mark.case(37)
def test_a_disabled_callback_logs_counts_and_waits_for_nothing(wandb: RecordingWandb) -> None:
    amp = AmpWandbCallback(enabled=False, precision="16", every_n_steps=1)
    plain = torch.amp.GradScaler("cpu")
    trainer = plain_trainer(plain, callbacks=[amp])
    amp.setup(trainer, None, "fit")
    amp.on_train_start(trainer, None)
    steps(amp, trainer, 1, 2)
    amp.on_train_epoch_end(trainer, None)
    amp.on_exception(trainer, None, ValueError())
    amp.on_train_end(trainer, None)
    assert (wandb.rows, wandb.alerts, wandb.run.summary) == ([], [], {})
    assert trainer.strategy.precision_plugin.scaler is plain


@pytest.mark.case(37)
@pytest.mark.case(10)
def test_a_disabled_callback_does_not_disable_another(wandb: RecordingWandb) -> None:
    off, on = AmpWandbCallback(enabled=False), callback()
    trainer = plain_trainer(FixedScaler(8.0), callbacks=[off, on])
    for amp in (off, on):
        steps(amp, trainer, 1)
    assert [step for step, _ in wandb.rows] == [1]


@pytest.mark.case(39)
@pytest.mark.parametrize("place", [{"is_global_zero": False}, {"global_rank": 3}])
def test_other_ranks_do_not_call_wandb(wandb: RecordingWandb, place: dict[str, Any]) -> None:
    amp, trainer = callback(), plain_trainer(FixedScaler(0.0), **place)
    steps(amp, trainer, 1, 2)
    amp.on_train_end(trainer, None)
    assert (wandb.rows, wandb.alerts, wandb.run.summary, amp._tracker.queue) == ([], [], {}, None)


def test_an_alert_goes_to_wandb_and_to_on_alert_or_the_log(
    wandb: RecordingWandb, caplog: pytest.LogCaptureFixture
) -> None:
    received: list[tuple[Alert, int]] = []
    limits = Limits(floor=8.0, floor_steps=2)
    steps(
        callback(limits=limits, on_alert=lambda *given: received.append(given)), plain_trainer(FixedScaler(8.0)), 1, 2
    )
    ((alert, step),) = received
    assert (alert.kind, step, caplog.messages) == ("scale_at_floor", 2, [])
    assert wandb.alerts == [(alert.title, f"step 2: {alert.text}")]
    steps(callback(limits=limits), plain_trainer(FixedScaler(8.0)), 2)
    assert caplog.messages == [f"step 2: {alert.title}: {alert.text}"]


def test_an_exception_ends_the_rows_without_waiting_for_the_other_ranks(
    wandb: RecordingWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    amp, trainer = callback(), plain_trainer(FixedScaler(8.0))
    steps(amp, trainer, 1)
    monkeypatch.setattr(amp._exchange, "take", lambda **_: pytest.fail("the ranks may not come together any more"))
    amp.on_exception(trainer, None, ValueError())
    assert wandb.run.summary["amp/loss_scale"] == 8.0


@pytest.mark.case(38)
@pytest.mark.parametrize(
    ("scaler", "scale"),
    [(FixedScaler(1024.0), 1024.0), (FixedScaler(0), 0.0), (torch.amp.GradScaler("cpu", 8.0), 8.0), (None, None),
     (torch.amp.GradScaler("cpu", 8.0, enabled=False), None), (RaisingScaler(ValueError()), None),
     (FixedScaler("8"), None)],
)  # fmt: skip
def test_get_loss_scale_returns_none_for_a_missing_scale(scaler: Any, scale: float | None) -> None:
    for amp in (AmpWandbCallback(precision="16"), AmpWandbCallback(enabled=False)):
        trainer = plain_trainer(scaler)
        assert amp.get_loss_scale(trainer) == amp._get_loss_scale(trainer) == scale
    assert AmpWandbCallback(precision="bf16").get_loss_scale(plain_trainer(scaler)) is None


def test_without_a_strategy_the_loss_scale_is_none() -> None:
    assert AmpWandbCallback(precision="16").get_loss_scale(object()) is None
