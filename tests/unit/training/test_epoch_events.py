"""The events of a training have the metrics that Lightning computes at the end of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from launcher.core.events import EventLog, read_events
from launcher.report.history import read_history
from launcher.report.metrics import collect_metrics
from launcher.training.callbacks.events import EventWriter


class EpochMetrics(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", float(self.current_epoch), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 10.0 + self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class FailingMetrics(EpochMetrics):
    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.fails_at = fails_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.fails_at:
            raise KeyError("label 17")
        return super().training_step(batch, batch_idx)


def _make_trainer(file: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", callbacks=[EventWriter(EventLog(file, 0))], logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      log_every_n_steps=50, **options)  # fmt: skip


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_training_that_fails_in_its_first_epoch_has_the_metrics_of_its_first_step(
    tmp_path: Path, fails_at: int
) -> None:
    file = tmp_path / "events.jsonl"
    data = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        _make_trainer(file, max_epochs=1, limit_val_batches=0).fit(FailingMetrics(fails_at), data, data)
    history = read_history(read_events(file))
    metrics = collect_metrics(history)
    assert list(metrics) == (["train_loss_step"] if fails_at else [])
    assert [line.steps.tolist() for metric in metrics.values() for line in metric.lines] == [[1]] * len(metrics)
    assert [step.learning_rates for step in history.attempts[0].steps] == [(1e-3,)] * len(metrics)


@pytest.mark.parametrize("has_validation", [True, False])
def test_each_epoch_has_its_metrics_with_few_steps_and_without_validation(tmp_path: Path, has_validation: bool) -> None:
    file = tmp_path / "events.jsonl"
    trainer = _make_trainer(file, max_epochs=3, limit_val_batches=1.0 if has_validation else 0)
    data = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)  # type: ignore[arg-type]
    trainer.fit(EpochMetrics(), data, data)
    events = [event for event in read_events(file) if event["kind"] == "epoch"]
    assert [(event["step"], event["epoch"]) for event in events] == [(4, 0), (8, 1), (12, 2)]
    metrics = collect_metrics(read_history(read_events(file)))
    found = {name: [value for line in m.lines for value in line.values.tolist()] for name, m in metrics.items()}
    assert found["train_acc"] == [0, 1, 2]
    assert len(found["train_loss_epoch"]) == 3
    assert found.get("val_acc") == ([10, 11, 12] if has_validation else None)
    assert "train_loss" not in found
