"""The run's own checkpoints, beside any that the user keeps."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

from launcher.config.schema import CheckpointOptions
from launcher.training.loops.batch_end import CheckpointAfterBatch


class RunCheckpoint(CheckpointAfterBatch):
    """Keeps what a run resumes from, whatever checkpoint callbacks the user has.

    A type of its own: Lightning takes the Trainer's callbacks of a type away if the model's `configure_callbacks`
    brings one of that type, and callbacks of one type need different settings to be saved together.

    Args:
        options: when to save.
        folder: where.
    """

    def __init__(self, options: CheckpointOptions, folder: Path) -> None:
        super().__init__(
            dirpath=folder,
            filename="{epoch}-{step}",
            monitor=options.monitor,
            mode=options.mode,
            save_top_k=options.save_top_k,
            save_last=True,
            every_n_train_steps=options.every_n_steps,
            every_n_epochs=options.every_n_epochs,
            # One `last.ckpt`, overwritten: that is where a resume looks.
            enable_version_counter=False,
        )

    @property
    @override
    def _legacy_state_key(self) -> Any:
        # Until now it was Lightning's own class.
        return self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Behind those that the model brought: `trainer.checkpoint_callback` is the first. A list of its own, as
        # Lightning is going through the other one.
        connected: Any = trainer
        connected.callbacks = [*(each for each in connected.callbacks if each is not self), self]

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if trainer.checkpoint_callback is self:
            super()._save_checkpoint(trainer, filepath)
            return
        # The user's own are the ones that loggers may upload.
        trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath


def hide_from_advice(trainer: pl.Trainer) -> None:
    """Let `test(ckpt_path="best")` not warn of several `ModelCheckpoint`s where the user has one at most."""
    connected: Any = trainer
    connected._checkpoint_connector.__class__ = _Connector


class _Connector(_CheckpointConnector):
    @override
    def _parse_ckpt_path(self, *arguments: Any, **options: Any) -> Any:
        own = [each for each in self.trainer.checkpoint_callbacks if not isinstance(each, RunCheckpoint)]
        with warnings.catch_warnings():
            if len(own) < 2:
                warnings.filterwarnings("ignore", message=".*configured with multiple `ModelCheckpoint` callbacks.*")
            return super()._parse_ckpt_path(*arguments, **options)


def best_checkpoint(trainer: pl.Trainer) -> tuple[Path | str | None, str | None]:
    """The best checkpoint by the first callback with a monitor, the user's before the run's own.

    Returns:
        Its path, or its URL, and the monitor. Without a monitor what the first callback saved last; None if nothing
        was saved.
    """
    keepers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    saved = [each for each in keepers if each.best_model_path]
    chosen = next((each for each in saved if each.monitor is not None), next(iter(saved), None))
    if chosen is None:
        return None, None
    place = chosen.best_model_path
    return Path(place) if _is_local_file_protocol(place) else place, chosen.monitor


def take_file_urls(callbacks: Iterable[pl.Callback]) -> None:
    """Let a `ModelCheckpoint` with a `file://` URL save there: Lightning takes it for a folder named `file:`."""
    misread = os.path.realpath("file:") + os.sep
    for each in callbacks:
        if isinstance(each, ModelCheckpoint) and each.dirpath is not None:
            folder = str(each.dirpath)
            if folder.startswith(misread):
                each.dirpath = os.sep + folder.removeprefix(misread)
