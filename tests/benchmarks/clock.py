"""A callback that measures a training's speed from the inside, the same for every launcher."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Clock(pl.Callback):
    """Writes the speed of the steps after the first `warm_up` to the file SPEED, on rank zero.

    `mean`: optimizer steps per second over all of them. `median`: the inverse of the median step, which short
    bursts of other load do not change.
    """

    def __init__(self, warm_up: int = 20) -> None:
        self.warm_up = warm_up
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            ends = self.ends[self.warm_up :]
            steps = [after - before for before, after in itertools.pairwise(ends)]
            speed = {"mean": len(steps) / sum(steps), "median": 1 / statistics.median(steps)}
            Path(os.environ["SPEED"]).write_text(json.dumps(speed))
