"""A rank that kills itself in a hook, for moments that a kill from outside seldom meets."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.benchmarks.recovery import trace

# Rank, moment, epoch and batch.
VARIABLE = "RECOVERY_SELF_KILL"
# The moments and their hooks; the last two need a validation.
MOMENTS = {
    "start": "on_train_batch_start",
    "backward": "on_before_backward",
    "reduced": "on_after_backward",
    "stepping": "on_before_optimizer_step",
    "end": "on_train_batch_end",
    "epoch": "on_train_epoch_end",
    "saving": "on_save_checkpoint",
    "validation": "on_validation_batch_end",
    "validated": "on_validation_end",
}


def killed_file(folder: Path) -> Path:
    """Contains the monotonic clock of the kill."""
    return folder / "killed"


class SelfKill(pl.Callback):
    """Kills this rank once, at the first call of the moment's hook in a batch or later."""

    def __init__(self) -> None:
        self._at = (0, 0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        wanted = os.environ.get(VARIABLE, "").split()
        if not wanted or int(wanted[0]) != trainer.global_rank or killed_file(trace.folder()).exists():
            return
        target, hook = (int(wanted[2]), int(wanted[3])), MOMENTS[wanted[1]]

        def kill(*_: Any, **__: Any) -> None:
            if self._at >= target and not trainer.sanity_checking:
                killed_file(trace.folder()).write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)

        def start(_: Any, __: Any, ___: Any, batch_idx: int) -> None:
            self._at = (trainer.current_epoch, batch_idx)
            if hook == "on_train_batch_start":
                kill()

        setattr(self, hook, kill)
        setattr(self, "on_train_batch_start", start)  # noqa: B010 -- of another type than the base class has
