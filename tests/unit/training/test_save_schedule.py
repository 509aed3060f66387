"""`checkpoint.every: auto` in a training: which steps are saved, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from launcher.checkpoint.save_interval import FailureHistory
from launcher.config.schema import CheckpointOptions
from launcher.core.event_text import describe_event
from launcher.core.events import EventLog, read_events
from launcher.training.callbacks.run_checkpoint import RunCheckpoint
from launcher.training.callbacks.save_schedule import FIRST, SaveSchedule


class Saved(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def _train(folder: Path, model: BoringModel, steps: int, *, monitor: str | None = None, **options: Any) -> Any:
    """The steps that were saved, and the events."""
    (folder / "events.jsonl").touch()
    log = EventLog(folder / "events.jsonl", 0)
    schedule = SaveSchedule(log, lambda: FailureHistory(0, 0.0, 1), lambda: 0.0)
    saved = Saved()
    checkpoint = RunCheckpoint(CheckpointOptions(every="auto", monitor=monitor), folder / "checkpoints", None, schedule)
    trainer = pl.Trainer(accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[saved, checkpoint],
                         limit_val_batches=1, **options)  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(model)
    return sorted(set(saved.steps)), [
        e for e in read_events(folder / "events.jsonl") if e["kind"] == "checkpoint_interval"
    ]


def test_saves_after_the_first_steps_and_then_at_the_chosen_intervals(tmp_path: Path) -> None:
    # So few failures are expected that each interval is four times the one before.
    saved, events = _train(tmp_path, BoringModel(), 300)
    assert saved == [FIRST + 1, 5 * FIRST + 1, 21 * FIRST + 1]
    assert [(event["kind"], event["step"], event["steps"]) for event in events] == [
        ("checkpoint_interval", step, steps) for step, steps in zip(saved, (40, 160, 640), strict=True)
    ]
    text = describe_event(events[0], "checkpoint_interval")
    assert text.startswith("saves after 40 steps: a save stops the training for ")
    assert text.endswith(", at most 4 times the interval before")


class Logged(BoringModel):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("x", float(-self.global_step))
        return super().validation_step(batch, batch_idx)


def test_a_metric_of_the_validation_is_awaited(tmp_path: Path) -> None:
    saved, events = _train(tmp_path, Logged(), 70, monitor="x", limit_train_batches=20)
    assert saved == [21, 61], "after the first validation, and 40 steps later"
    assert [event["step"] for event in events] == [21, 61]
