"""Every kind of logger receives the monitor's rows, alerts and the final summary; one that fails costs a notice."""

from __future__ import annotations

import csv
import io
import threading
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from typing_extensions import override

from launcher.config.schema import WandbOptions, WatchOptions
from launcher.core.events import EventLog
from launcher.core.output import RunOutput
from launcher.loggers import lightning_tracker
from launcher.loggers.base import LogStep
from launcher.loggers.lightning_tracker import LightningTracker
from launcher.loggers.selection import make_trackers, make_wandb_logger
from launcher.loggers.wandb_tracker import WandbTracker
from launcher.monitoring.rank_monitor import RankMonitor
from launcher.runs.directory import RunDirectory
from tests.support.plain_trainer import FixedScaler, plain_trainer
from tests.support.wandb_stand_in import RecordingWandb

LONG = 60.0
ROW: dict[str, Any] = {
    "amp/enabled": True,
    "amp/precision": "16-mixed",
    "amp/loss_scale": 1024.0,
    "perf/step_seconds": 0.5,
    "epoch": 2,
}
SUMMARY = {"amp/loss_scale": 1024.0, "final/loss": 0.25, "final/steps": 50, "final/best_checkpoint": "/runs/a/b.ckpt"}
# The batch of the 50th optimizer step is Lightning's 49th.
STEP = LogStep(50, 49)


@pytest.fixture
def file_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    # Newer versions of MLflow reject a file store without it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path / 'mlruns'}"


def log_all(logger: Any) -> list[str]:
    """A row, an alert and the summary; returns the notices."""
    notices: list[str] = []
    tracker = LightningTracker(logger, notices.append)
    tracker.log_row(ROW, STEP)
    tracker.alert("slow_rank", "rank 1 is slow", "rank 1 needs 2 s", STEP)
    tracker.summarize(SUMMARY, STEP)
    tracker.finish()
    return notices


def test_a_csv_file_has_the_rows_between_the_users_own(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 0.5}, 48)
    assert log_all(logger) == []
    logger.log_metrics({"loss": 0.25}, 49)
    logger.finalize("success")
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert found == [
        {"loss": "0.5", "step": "48"},
        {"amp/enabled": "1", "amp/precision": "16-mixed", "amp/loss_scale": "1024.0", "perf/step_seconds": "0.5",
         "epoch": "2", "step": "49"},
        {"alert/slow_rank": "step 50: rank 1 is slow: rank 1 needs 2 s", "step": "49"},
        {"final/loss": "0.25", "final/steps": "50", "final/best_checkpoint": "/runs/a/b.ckpt", "step": "49"},
        {"loss": "0.25", "step": "49"},
    ]  # fmt: skip


def test_tensorboard_has_scalars_and_texts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    assert log_all(logger) == []
    logger.finalize("success")
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"amp/enabled": [(49, 1.0)], "amp/loss_scale": [(49, 1024.0)], "perf/step_seconds": [(49, 0.5)],
                       "final/loss": [(49, 0.25)], "final/steps": [(49, 50.0)]}  # fmt: skip
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts == {
        "alert/slow_rank/text_summary": "step 50: rank 1 is slow: rank 1 needs 2 s",
        "final/best_checkpoint/text_summary": "/runs/a/b.ckpt",
    }


def test_mlflow_has_metrics_and_tags(file_store: str) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=file_store)
    assert log_all(logger) == []
    logger.finalize("success")
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics == {"amp/enabled": 1, "amp/loss_scale": 1024, "perf/step_seconds": 0.5,
                                "final/loss": 0.25, "final/steps": 50}  # fmt: skip
    assert [each.step for each in logger.experiment.get_metric_history(logger.run_id, "amp/loss_scale")] == [49]
    assert run.data.tags["alert/slow_rank"] == "step 50: rank 1 is slow: rank 1 needs 2 s"
    assert run.data.tags["final/best_checkpoint"] == "/runs/a/b.ckpt"
    assert run.info.status == "FINISHED"


class Numbers(Logger):
    """A user's logger, which accepts only numbers and hyperparameters."""

    name = version = "numbers"

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.parameters: list[dict[str, Any]] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.error is not None:
            raise self.error
        self.rows.append((step, metrics))

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.parameters.append(params)


def test_another_logger_gets_numbers_and_the_texts_of_the_end_as_hyperparameters() -> None:
    logger = Numbers()
    assert log_all(logger) == []
    assert logger.rows == [
        (49, {"amp/enabled": 1, "amp/loss_scale": 1024.0, "perf/step_seconds": 0.5}),
        (49, {"alert/slow_rank": 1.0}),
        (49, {"final/loss": 0.25, "final/steps": 50}),
    ]
    assert logger.parameters == [{"final/best_checkpoint": "/runs/a/b.ckpt"}]


def test_a_csv_logger_whose_user_takes_numbers_only_gets_no_text(tmp_path: Path) -> None:
    class Floats(CSVLogger):
        @override
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            super().log_metrics({name: float(value) for name, value in metrics.items()}, step)

    assert log_all(Floats(tmp_path, version=0)) == []


def test_a_logger_that_raises_costs_one_notice() -> None:
    notices: list[str] = []
    tracker = LightningTracker(Numbers(OSError("disk full")), notices.append)
    for _ in range(3):
        tracker.log_row(ROW, STEP)
    tracker.alert("slow_rank", "slow", "rank 1", STEP)
    tracker.finish()
    assert notices == ["Numbers did not accept the loss scale: OSError: disk full; training continues"]


class Stalled(MLFlowLogger):
    """Its server does not answer until `answers` is set."""

    def __init__(self) -> None:
        self.entered, self.answers = threading.Event(), threading.Event()
        self.rows: list[int | None] = []

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.entered.set()
        assert self.answers.wait(LONG)
        self.rows.append(step)


def test_a_server_that_does_not_answer_delays_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_tracker, "_FLUSH_TIMEOUT", 0.0)
    notices: list[str] = []
    logger = Stalled()
    tracker = LightningTracker(logger, notices.append)
    tracker.log_row(ROW, STEP)
    assert logger.entered.wait(LONG)
    tracker.log_row(ROW, LogStep(60, 59))
    tracker.finish()
    tracker.finish()
    assert notices == ["Stalled did not accept all rows in time; training was not delayed"]
    assert logger.rows == []
    logger.answers.set()
    assert tracker._queue is not None
    assert tracker._queue.flush(LONG)
    assert logger.rows == [49], "the row behind it was dropped"


def test_an_error_in_the_background_is_one_notice_too(monkeypatch: pytest.MonkeyPatch, file_store: str) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=file_store)
    monkeypatch.setattr(type(logger), "log_metrics", lambda *_: (_ for _ in ()).throw(ConnectionError("refused")))
    assert log_all(logger)[0] == (
        "MLFlowLogger did not accept the loss scale: ConnectionError: refused; training continues"
    )


def output_to(folder: Path) -> RunOutput:
    return RunOutput(EventLog(folder / "events.jsonl", 0), Console(file=io.StringIO()), is_rank_zero=True)


def trackers_of(folder: Path, mode: Any, *loggers: Any) -> list[Any]:
    run = RunDirectory(folder, None, "abcd1234", is_new=True)
    wandb = make_wandb_logger(WandbOptions(mode), run, {}, pytest.fail)
    return make_trackers([*loggers, *([] if wandb is None else [wandb])], wandb, pytest.fail)


def test_each_logger_of_a_run_has_one_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    csv_logger, users = CSVLogger(tmp_path), WandbLogger(project="users")
    kinds = [WandbTracker, LightningTracker]
    assert [type(each) for each in trackers_of(tmp_path, "offline", csv_logger)] == kinds
    assert [type(each) for each in trackers_of(tmp_path, "offline", csv_logger, users)] == kinds, "one W&B run"
    assert [type(each) for each in trackers_of(tmp_path, "disabled", csv_logger)] == [LightningTracker]
    assert trackers_of(tmp_path, "disabled") == []


@pytest.mark.parametrize("is_zero", [True, False])
def test_a_run_writes_to_all_its_trackers_from_rank_zero(tmp_path: Path, wandb: RecordingWandb, is_zero: bool) -> None:
    broken, numbers = Numbers(OSError("disk full")), Numbers()
    notices: list[str] = []
    wandb_tracker = WandbTracker(notices.append)
    trackers = [LightningTracker(broken, notices.append), LightningTracker(numbers, notices.append), wandb_tracker]
    monitor = RankMonitor(
        WatchOptions(every_n_steps=1), "16-mixed", output_to(tmp_path), trackers, lambda _: {"final/steps": 2}
    )
    trainer = plain_trainer(FixedScaler(8.0), is_global_zero=is_zero)
    for step, scale in ((1, 8.0), (2, 0.0)):
        trainer.global_step, trainer.strategy.precision_plugin.scaler.scale = step, scale
        monitor.on_train_batch_end(trainer, None, None, None, 0)
    monitor.on_train_end(trainer, None)
    monitor.teardown(trainer, None, "fit")
    monitor.teardown(trainer, None, "validate")
    if not is_zero:
        assert (numbers.rows, notices, wandb.rows, wandb.run.summary) == ([], [], [], {})
        return
    assert [(step, row.get("amp/loss_scale")) for step, row in numbers.rows] == [
        (0, 8.0), (1, 0.0), (1, None), (1, None),
    ]  # fmt: skip
    assert [row for _, row in numbers.rows[2:]] == [{"alert/scale_underflow": 1.0}, {"final/steps": 2}]
    assert [row["trainer/global_step"] for _, row in wandb.rows] == [1, 2]
    assert [title for title, _ in wandb.alerts] == ["the loss scale is 0"]
    assert wandb.run.summary == {"amp/precision": "16-mixed", "amp/loss_scale": 0.0, "final/steps": 2}
    assert notices == ["Numbers did not accept the loss scale: OSError: disk full; training continues"]
