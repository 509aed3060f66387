"""What waits for the checkpoints that are written beside the training."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from typing_extensions import override

from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.manifest import publish_again
from launcher.checkpoint.storage import explained_writes


class PendingWrites(pl.Callback):
    """At the end of the training, and after an error, no checkpoint is still being written for callbacks after this."""

    def __init__(self, background: BackgroundWriter) -> None:
        self._background = background

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._background.wait()
        # Callbacks of every rank may read the files.
        trainer.strategy.barrier()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # the first error ends the run
            self._background.wait()


def publish_again_explained(checkpoint: Path, other: Path) -> None:
    """As `publish_again`, with a `StorageError` for an error of the disk."""
    with explained_writes(other.parent):
        publish_again(checkpoint, other)


def reads_files(logger: Logger) -> bool:
    """Whether a logger may read a checkpoint when it is informed of it."""
    if type(logger).after_save_checkpoint is Logger.after_save_checkpoint or isinstance(logger, TensorBoardLogger):
        return False
    return bool(getattr(logger, "_log_model", True))
