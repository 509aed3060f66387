"""`launcher.AmpWandbCallback` in real Lightning Trainers, and on a real offline W&B run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from launcher import AmpWandbCallback
from launcher.monitoring.loss_scale_monitor import LossScaleMonitor
from strategies.loss_scale import CountingGradScaler
from tests.support.wandb_file import alerts, history_rows, summary_of
from tests.support.wandb_stand_in import RecordingWandb

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The .srun. command is available"),
    pytest.mark.filterwarnings("ignore:.*set_vital.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(pl.LightningModule):
    """One layer; the gradients of the optimizer steps in `overflow_at` do not fit into any fp16 scale."""

    def __init__(self, overflow_at: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.overflow_at = overflow_at

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).float().pow(2).mean() + 1
        return loss * (1e36 if self.global_step in self.overflow_at else 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fp16(init_scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale))


def fit(folder: Path, model: Net, *callbacks: pl.Callback, resume: Path | None = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **{"logger": False, "enable_checkpointing": False, "plugins": [fp16()], **options},
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.ones(24, 4)), batch_size=2)
    trainer.fit(model, data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return trainer


def column(wandb: RecordingWandb, name: str) -> list[Any]:
    return [row.get(name) for _, row in wandb.rows]


@pytest.mark.case(11)
def test_a_real_fp16_training_shows_its_scale_and_its_skipped_step(tmp_path: Path, wandb: RecordingWandb) -> None:
    trainer = fit(tmp_path, Net(overflow_at=(2,)), AmpWandbCallback(every_n_steps=2), max_steps=6)
    assert isinstance(trainer.precision_plugin.scaler, CountingGradScaler)
    assert [step for step, _ in wandb.rows] == [2, 4, 6]
    assert column(wandb, "amp/loss_scale") == [1024.0, 512.0, 512.0]
    assert column(wandb, "amp/skipped_steps") == [0, 1, 1]
    assert column(wandb, "amp/skip_rate") == [0.0, 0.5, 0.0]
    assert column(wandb, "amp/precision") == ["16-mixed"] * 3
    assert column(wandb, "amp/growth_tracker") == [2, 1, 3]
    assert all(0 < data < step for data, step in zip(column(wandb, "perf/data_seconds")[1:],
                                                     column(wandb, "perf/step_seconds")[1:], strict=True))  # fmt: skip
    assert wandb.run.summary == {"amp/loss_scale": 512.0, "amp/skipped_steps": 1, "amp/precision": "16-mixed"}


def test_each_epochs_end_is_logged(tmp_path: Path, wandb: RecordingWandb) -> None:
    fit(tmp_path, Net(), AmpWandbCallback(every_n_steps=8), max_epochs=2)
    assert [(step, row["epoch"]) for step, row in wandb.rows] == [(8, 0), (12, 0), (16, 1), (24, 1)]


def test_the_trainers_interval_is_the_default_and_accumulated_batches_are_one_step(
    tmp_path: Path, wandb: RecordingWandb
) -> None:
    fit(tmp_path, Net(), AmpWandbCallback(), max_steps=4, accumulate_grad_batches=3, log_every_n_steps=2)
    assert [step for step, _ in wandb.rows] == [2, 4]
    assert column(wandb, "amp/skipped_steps") == [0, 0]


@pytest.mark.case(21)
def test_a_resumed_training_continues_its_scale_and_counts(tmp_path: Path, wandb: RecordingWandb) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    options: dict[str, Any] = {"enable_checkpointing": True}
    fit(tmp_path, Net(overflow_at=(1,)), AmpWandbCallback(every_n_steps=12), keep, max_epochs=1, **options)
    wandb.rows.clear()
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    resume = tmp_path / "last.ckpt"
    fit(tmp_path, Net(), AmpWandbCallback(every_n_steps=12), keep, max_epochs=2, resume=resume, **options)
    assert [
        (step, row["amp/loss_scale"], row["amp/skipped_steps"], row["amp/skip_rate"]) for step, row in wandb.rows
    ] == [(24, 512.0, 1, 0.0)]


@pytest.mark.case(12)
@pytest.mark.case(13)
def test_a_scale_at_the_floor_raises_one_alert(tmp_path: Path, wandb: RecordingWandb) -> None:
    from launcher.monitoring.health import Limits

    amp = AmpWandbCallback(every_n_steps=1, limits=Limits(floor_steps=3))
    fit(tmp_path, Net(overflow_at=tuple(range(9))), amp, max_steps=8, plugins=[fp16(init_scale=256.0)])
    assert column(wandb, "amp/loss_scale") == [128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]
    fit(tmp_path, Net(overflow_at=tuple(range(9))), amp, max_steps=6, plugins=[fp16(init_scale=2.0)])
    assert column(wandb, "amp/floor_steps")[8:] == [1, 2, 3, 4, 5, 6]
    assert [(title, text.split(":")[0]) for title, text in wandb.alerts] == [
        ("the loss scale stays at its floor", "step 3")
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_in_another_precision_only_times_are_logged(tmp_path: Path, wandb: RecordingWandb, precision: str) -> None:
    fit(tmp_path, Net(), AmpWandbCallback(every_n_steps=2), max_steps=2, plugins=None, precision=precision)
    ((step, row),) = wandb.rows
    assert (step, row["amp/precision"]) == (2, precision)
    assert [name for name in row if name.startswith("amp/")] == ["amp/enabled", "amp/precision"]
    assert row["perf/step_seconds"] > 0


@pytest.mark.case(10)
def test_two_callbacks_in_a_real_trainer_log_once(tmp_path: Path, wandb: RecordingWandb) -> None:
    fit(tmp_path, Net(), AmpWandbCallback(every_n_steps=2), AmpWandbCallback(every_n_steps=2), max_steps=4)
    assert [step for step, _ in wandb.rows] == [2, 4]


@pytest.mark.case(14)
def test_a_real_training_continues_with_a_scaler_that_raises(
    tmp_path: Path, wandb: RecordingWandb, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(torch.amp.GradScaler):
        def _get_scale_async(self) -> None:
            raise RuntimeError("no scale today")

    plugin = MixedPrecision("16-mixed", "cpu", Broken("cpu"))
    trainer = fit(tmp_path, Net(), AmpWandbCallback(every_n_steps=1), max_steps=3, plugins=[plugin])
    assert trainer.global_step == 3
    assert column(wandb, "amp/loss_scale") == [None] * 3
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "launcher.monitoring.loss_scale_monitor"]
    assert "RuntimeError: no scale today" in warning


def test_the_monitor_alone_needs_neither_launcher_nor_wandb(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    fit(
        tmp_path,
        Net(overflow_at=(0,)),
        LossScaleMonitor(every_n_steps=2),
        max_steps=2,
        logger=logger,
        log_every_n_steps=2,
    )
    (row,) = [m for m in logger.experiment.metrics or _csv(logger) if m.get("amp/loss_scale") not in (None, "")]
    assert float(row["amp/loss_scale"]) == 512.0


def _csv(logger: CSVLogger) -> list[dict[str, Any]]:
    import csv

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def wandb_run(tmp_path: Path) -> Iterator[Any]:
    """A real offline run; W&B's own process ends with the test."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    yield wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=settings)
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.case(41)
@pytest.mark.case(29)
def test_a_real_offline_run_holds_rows_alerts_and_the_summary(tmp_path: Path, wandb_run: Any) -> None:
    import wandb as wandb_module

    amp = AmpWandbCallback(every_n_steps=2)
    broken = MixedPrecision("16-mixed", "cpu", CountingGradScaler("cpu", init_scale=math.inf))
    fit(tmp_path, Net(), amp, max_steps=6, plugins=[broken])
    trainer = fit(tmp_path, Net(overflow_at=(2,)), AmpWandbCallback(every_n_steps=2), max_steps=6)
    wandb_run.finish()
    # W&B's process writes the end of the file when it ends.
    wandb_module.teardown()

    assert trainer.global_step == 6
    rows = [row for row in history_rows(tmp_path) if "amp/enabled" in row]
    assert [row["trainer/global_step"] for row in rows] == [2, 4, 6, 2, 4, 6]
    assert [row["amp/loss_scale"] for row in rows] == [math.inf] * 3 + [1024.0, 512.0, 512.0]
    assert [row["amp/skipped_steps"] for row in rows] == [2, 4, 6, 0, 1, 1]
    assert [row["amp/overflow"] for row in rows] == [True] * 3 + [False] * 3
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    (alert,) = alerts(tmp_path)
    assert alert[0] == "the loss scale is not finite"
    wanted = {"amp/loss_scale": 512.0, "amp/skipped_steps": 1, "amp/precision": "16-mixed"}
    assert {name: summary_of(tmp_path)[name] for name in wanted} == wanted
    assert amp.dropped == 0
