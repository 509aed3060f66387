"""A callback that measures a training's speed from the inside, the same for every launcher."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Clock(pl.Callback):
    """Writes the optimizer steps per second between `first` and the last step to the file SPEED, on rank zero."""

    def __init__(self, first: int = 20) -> None:
        self.first = first
        self.began: float | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.began is None and trainer.global_step >= self.first:
            self.began = time.perf_counter()
            self.first = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.began is not None:
            speed = (trainer.global_step - self.first) / (time.perf_counter() - self.began)
            Path(os.environ["SPEED"]).write_text(str(speed))
