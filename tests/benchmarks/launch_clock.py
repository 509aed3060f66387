"""Measures start and restart: a Lightning callback, and a plain Lightning script.

The callback appends a line to the file MARKS at each optimizer step of rank zero: wall-clock seconds, step, process id.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Marks(pl.Callback):
    """Writes when steps end, and the process ids of all ranks; sleeps `pause` seconds in each step."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Path(f"{os.environ['MARKS']}-pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            with Path(os.environ["MARKS"]).open("a") as file:
                file.write(f"{time.time()} {trainer.global_step} {os.getpid()}\n")
        if self.pause:
            time.sleep(self.pause)


def read_marks(path: Path) -> list[tuple[float, int]]:
    """Time and step of each line so far."""
    if not path.exists():
        return []
    lines = (line.split() for line in path.read_text().splitlines())
    return [(float(arguments[0]), int(arguments[1])) for arguments in lines if len(arguments) == 3]


def main() -> None:
    """The peer: the same toy under plain Lightning, resumed from its last checkpoint. torchrun starts the ranks."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.support.toy import Toy, ToyData

    ranks = int(os.environ.get("WORLD_SIZE") or os.environ["DEVICES"])
    checkpoint = ModelCheckpoint("checkpoints", save_last=True, every_n_train_steps=1, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp",
        max_steps=int(os.environ["STEPS"]),
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Marks(float(os.environ.get("PAUSE", "0"))), checkpoint],
    )
    trainer.fit(Toy(), ToyData(batch_size=2, size=512), ckpt_path="last", weights_only=True)


if __name__ == "__main__":
    main()
