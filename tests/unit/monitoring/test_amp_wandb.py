"""`launcher.AmpWandbCallback` and W&B: missing, broken, stalled, ahead in its steps; its summary at the end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.loggers import wandb_tracker
from launcher.loggers.row_queue import RowQueue
from launcher.monitoring.gather import Gathered
from launcher.monitoring.samples import RankSample
from strategies.loss_scale import CountingGradScaler
from tests.support.amp_steps import LONG, callback, only_row, steps
from tests.support.plain_trainer import FixedScaler, plain_trainer
from tests.support.wandb_stand_in import RecordingWandb


def forget_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the imported module for the test; restored at its end."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    del sys.modules["wandb"]


def test_charts_are_defined_once_and_are_optional(wandb: RecordingWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    amp = callback()
    trainer = plain_trainer(FixedScaler(8.0))
    steps(amp, trainer, 1, 2)
    assert len(wandb.charts) == 2
    monkeypatch.delattr(RecordingWandb, "define_metric")
    steps(callback(), trainer, 3)
    assert len(wandb.rows) == 3


@pytest.mark.parametrize("wandbs_own", [40, 41])
def test_a_row_is_not_lost_if_wandbs_step_is_ahead(wandb: RecordingWandb, wandbs_own: int) -> None:
    wandb.run.step = wandbs_own
    steps(callback(), plain_trainer(FixedScaler(8.0), step=7))
    assert wandb.rows[0][0] == wandbs_own + 1
    assert only_row(wandb)["trainer/global_step"] == 7


def test_with_lightnings_logger_wandb_counts_the_rows(wandb: RecordingWandb) -> None:
    # Its rows come from the training's thread, which may advance W&B's step between reading and setting it.
    trainer: Any = plain_trainer(FixedScaler(8.0), step=7)
    trainer.loggers = [type("Theirs", (type("WandbLogger", (), {}),), {})()]
    steps(callback(), trainer)
    assert wandb.counted == 1
    assert only_row(wandb)["trainer/global_step"] == 7


@pytest.mark.case(7)
def test_without_a_run_nothing_is_logged_until_there_is_one(
    wandb: RecordingWandb, caplog: pytest.LogCaptureFixture
) -> None:
    run, wandb.run = wandb.run, None
    amp, trainer = callback(), plain_trainer(FixedScaler(0.0))
    steps(amp, trainer, 1)
    assert (wandb.rows, wandb.alerts, amp.dropped) == ([], [], 0)
    wandb.run = run
    steps(amp, trainer, 2)
    assert [step for step, _ in wandb.rows] == [2]
    wandb.run = None
    amp.on_train_end(trainer, None)
    assert [r.getMessage() for r in caplog.records if "W&B" in r.getMessage()] == []


@pytest.mark.case(8)
def test_without_wandb_training_continues_with_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    notices: list[str] = []
    amp, trainer = callback(on_notice=notices.append), plain_trainer(FixedScaler(0.0))
    steps(amp, trainer, 1, 2, 3)
    amp.on_train_end(trainer, None)
    (notice,) = notices
    assert notice.startswith("the loss scale is not logged: ")
    assert notice.endswith("; pip install wandb")


@pytest.mark.case(8)
def test_a_folder_of_old_runs_is_not_imported_as_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without wandb installed, `import wandb` finds the folder `wandb/` of earlier runs as a namespace package.
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    forget_wandb(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    notices: list[str] = []
    amp, trainer = callback(on_notice=notices.append), plain_trainer(FixedScaler(8.0))
    steps(amp, trainer, 1, 2)
    amp.on_train_end(trainer, None)
    assert len(notices) == 1
    assert notices[0].startswith("the loss scale is not logged: ")


@pytest.mark.case(8)
def test_a_wandb_that_breaks_on_import_is_a_notice_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As with an incompatible protobuf.
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot be created directly')\n")
    forget_wandb(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    notices: list[str] = []
    steps(callback(on_notice=notices.append), plain_trainer(FixedScaler(8.0)), 1, 2)
    assert len(notices) == 1
    assert "Descriptors cannot be created" in notices[0]


@pytest.mark.case(29)
def test_the_summary_at_the_end_has_final_scale_skipped_steps_and_precision(wandb: RecordingWandb) -> None:
    scaler = CountingGradScaler("cpu", init_scale=64.0)
    amp, trainer = callback(), plain_trainer(scaler)
    steps(amp, trainer, 1)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 32.0, "counts": {"skipped_steps": 1}})
    steps(amp, trainer, 2)
    amp.on_train_end(trainer, None)
    assert wandb.run.summary == {"amp/loss_scale": 32.0, "amp/skipped_steps": 1, "amp/precision": "16"}


@pytest.fixture
def gate(wandb: RecordingWandb) -> Iterator[tuple[threading.Event, threading.Event]]:
    """W&B blocks in its first row from `entered` until `open`."""
    entered, opened = threading.Event(), threading.Event()

    def stall() -> None:
        entered.set()
        assert opened.wait(LONG)

    wandb.before = stall
    yield entered, opened
    opened.set()


@pytest.mark.case(41)
def test_a_stalled_wandb_costs_rows_that_are_counted_and_reported(
    wandb: RecordingWandb, gate: tuple[threading.Event, threading.Event]
) -> None:
    entered, opened = gate
    notices: list[str] = []
    amp, trainer = callback(capacity=4, on_notice=notices.append), plain_trainer(FixedScaler(8.0))
    for number in range(1, 21):
        trainer.global_step = number
        amp.on_train_batch_end(trainer, None, None, None, 0)
        assert entered.wait(LONG)
    # One is being written and four wait; the training has reached its twentieth step.
    assert amp.dropped == 15
    assert not amp.flush(0)
    opened.set()
    assert amp.flush(LONG)
    steps(amp, trainer, 21)
    assert [step for step, _ in wandb.rows] == [1, 2, 3, 4, 5, 21]
    assert wandb.rows[-1][1]["amp/dropped_rows"] == 15
    amp.on_train_end(trainer, None)
    assert notices == ["W&B did not accept 15 rows and alerts of the loss scale; training was not delayed"]


@pytest.mark.case(41)
def test_a_training_ends_while_wandb_stalls(
    wandb: RecordingWandb, gate: tuple[threading.Event, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_tracker, "FLUSH_TIMEOUT", 0.0)
    notices: list[str] = []
    amp, trainer = callback(capacity=4, on_notice=notices.append), plain_trainer(FixedScaler(8.0))
    for number in range(1, 4):
        trainer.global_step = number
        amp.on_train_batch_end(trainer, None, None, None, 0)
        assert gate[0].wait(LONG)
    amp.on_train_end(trainer, None)
    # Two rows and the summary waited for the first, which is still being written.
    assert (amp.dropped, len(notices)) == (3, 1)
    assert not amp.flush(0)


@pytest.mark.case(41)
def test_a_wandb_that_raises_costs_rows_that_are_counted_and_one_warning(
    wandb: RecordingWandb, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise ConnectionError("closed")

    wandb.before = refuse
    amp, trainer = callback(), plain_trainer(FixedScaler(8.0))
    steps(amp, trainer, 1, 2, 3)
    assert (amp.dropped, wandb.rows) == (3, [])
    assert caplog.messages == ["W&B did not accept a row: ConnectionError: closed; training continues"]
    wandb.before = lambda: None
    steps(amp, trainer, 4)
    assert only_row(wandb)["amp/dropped_rows"] == 3


@pytest.mark.case(41)
def test_a_shared_queue_is_not_closed(wandb: RecordingWandb, gate: tuple[threading.Event, threading.Event]) -> None:
    entered, opened = gate
    notices: list[str] = []
    writer = RowQueue(2)
    amp, trainer = callback(writer=writer, on_notice=notices.append), plain_trainer(FixedScaler(8.0))
    for number in range(1, 5):
        trainer.global_step = number
        amp.on_train_batch_end(trainer, None, None, None, 0)
        assert entered.wait(LONG)
    amp.on_train_end(trainer, None)
    # One row is being written, two wait; the fourth and the summary were dropped, which the owner reports.
    assert (amp.dropped, notices) == (2, [])
    opened.set()
    assert amp.flush(LONG)
    assert [step for step, _ in wandb.rows] == [1, 2, 3]
    assert writer.put(lambda: None)
    assert writer.close(LONG) == 2


def test_wandb_has_an_epochs_row_when_its_hook_returns(wandb: RecordingWandb) -> None:
    amp, trainer = callback(every_n_steps=100), plain_trainer(FixedScaler(8.0))
    for step in (10, 20, 30):
        trainer.global_step = step
        amp.on_train_epoch_end(trainer, None)
        assert wandb.rows[-1][1]["trainer/global_step"] == step


class Elsewhere:
    """The other ranks' samples, which arrive on `wait`."""

    world_size, rank = 2, 0

    def __init__(self, arrives: bool) -> None:
        self.arrives = arrives
        self.waits: list[float] = []
        self.sent: list[Gathered] = []
        self.arrived: list[Gathered] = []

    def send(self, step: int, epoch: int, values: dict[str, Any], batch: int) -> None:
        self.sent.append(Gathered(step, epoch, (RankSample(0, 8.0), RankSample(1, 8.0)), batch))

    def wait(self, timeout: float) -> None:
        self.waits.append(timeout)
        if self.arrives:
            self.arrived, self.sent = self.sent, []

    def take(self, *, wait: bool = False) -> list[Gathered]:
        found, self.arrived = self.arrived, []
        return found


@pytest.mark.parametrize(("arrives", "rows"), [(True, [10]), (False, [])])
def test_only_an_epochs_end_waits_for_the_other_ranks_samples(
    wandb: RecordingWandb, arrives: bool, rows: list[int]
) -> None:
    amp, trainer = callback(), plain_trainer(FixedScaler(8.0))
    exchange = Elsewhere(arrives)
    amp._exchange = exchange  # type: ignore[assignment]
    steps(amp, trainer, 9)
    assert (exchange.waits, wandb.rows) == ([], [])
    exchange.sent.clear()
    trainer.global_step = 10
    amp.on_train_epoch_end(trainer, None)
    assert ([step for step, _ in wandb.rows], exchange.waits) == (rows, [0.2])
    trainer.is_global_zero = False
    amp.on_train_epoch_end(trainer, None)
    assert exchange.waits == [0.2], "rank zero logs"


@pytest.mark.case(41)
def test_a_stalled_wandb_delays_one_epochs_end_and_not_each(
    wandb: RecordingWandb, gate: tuple[threading.Event, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    amp, trainer = callback(), plain_trainer(FixedScaler(8.0))
    waits: list[float] = []
    flush = amp._tracker.flush

    def noted(timeout: float) -> bool:
        waits.append(timeout)
        return flush(timeout)

    monkeypatch.setattr(amp._tracker, "flush", noted)
    for step in (1, 2, 3):
        trainer.global_step = step
        amp.on_train_epoch_end(trainer, None)
        assert gate[0].wait(LONG)
    assert [wait > 0 for wait in waits] == [True, False, False]
    assert max(waits) <= 0.2
    gate[1].set()
    assert flush(LONG)
    trainer.global_step = 4
    amp.on_train_epoch_end(trainer, None)
    assert [step for step, _ in wandb.rows] == [1, 2, 3, 4]
