"""Why a training ended, on real Trainers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping

from launcher.training.end_reason import find_end_reason
from tests.support.toy import Toy, ToyData


class StopsItself(Toy):
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = True


def _fit(folder: Path, model: Toy, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=folder,
                         **{"max_epochs": 3, "log_every_n_steps": 1, **options})  # fmt: skip
    trainer.fit(model, ToyData(batch_size=16, size=32))
    return trainer


def _never_better() -> EarlyStopping:
    return EarlyStopping("loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True, verbose=False)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Toy, {}, "max_epochs"),
        (Toy, {"max_steps": 3}, "max_steps"),
        (Toy, {"max_time": timedelta(0)}, "max_time"),
        (Toy, {"callbacks": "early"}, "early_stopping"),
        (StopsItself, {}, "should_stop"),
    ],
)
def test_the_limit_that_ended_a_training_is_named(
    tmp_path: Path, model: type[Toy], options: dict[str, Any], reason: str
) -> None:
    if "callbacks" in options:
        options = {**options, "callbacks": [_never_better()]}
    trainer = _fit(tmp_path, model(), **options)
    end = find_end_reason(trainer, trained_batches=1, resumed=False)
    assert end.name == reason
    assert (end.message is not None and "loss" in end.message) == (reason == "early_stopping")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_epochs": 1}, ": the run has 1 epoch already, and trainer.max_epochs is 1; raise it to train on"),
        ({"max_steps": 2}, ": trainer.max_steps is 2; raise it to train on"),
    ],
)
def test_a_resumed_run_that_is_complete_names_the_limit(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    trainer = _fit(tmp_path, Toy(), **options)
    end = find_end_reason(trainer, trained_batches=0, resumed=True)
    assert (end.name, end.message) == ("nothing_to_train", f"nothing was left to train after step 2{text}")
