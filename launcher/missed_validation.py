"""A validation that was due when a checkpoint was written is made up for by the run that goes on from it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader
from typing_extensions import override

KEY = "launcher_validation_due"


class MakeUpForValidation(pl.Callback):
    """Validates before the first step of a run that goes on from a checkpoint of a step that a validation follows.

    Lightning takes such a validation for done, as most checkpoints of that step are written after it: metrics, and
    whatever follows them, would lack it. It begins a pass over the validation's loaders all the same, which would draw
    from the training's random generators once more: so the loaders get one of their own.
    """

    def __init__(self) -> None:
        self._due = False

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = _is_due(trainer.fit_loop)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._due = checkpoint.get(KEY, False) and trainer.enable_validation

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        apply_to_collection(trainer.val_dataloaders, DataLoader, _give_generator)
        if self._due:
            self._due = False
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


def _give_generator(loader: DataLoader[Any]) -> DataLoader[Any]:
    if loader.generator is None:
        loader.generator = torch.Generator()
    return loader


def _is_due(loop: Any) -> bool:
    """Whether the loop is at the end of a step, before the validation that follows it."""
    counts = loop.epoch_loop.batch_progress.total
    in_step = counts.completed < counts.processed
    return in_step and loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
