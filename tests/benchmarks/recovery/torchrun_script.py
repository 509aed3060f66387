"""The training under plain Lightning; torchrun starts the ranks, and all of them resume from the last checkpoint.

A `StatefulDataLoader` and a seed of step and rank for dropout give a resumed run the same curve.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.benchmarks.recovery.training import BATCH, Data, Mlp, Pairs, Tracer


class StatefulData(Data):
    """With a loader whose position Lightning saves."""

    def train_dataloader(self) -> Any:
        return StatefulDataLoader(Pairs(self.size), batch_size=BATCH, shuffle=True)


def main() -> None:
    steps, every, ranks = int(sys.argv[1]), int(sys.argv[2]), int(os.environ["WORLD_SIZE"])
    pl.seed_everything(5, verbose=False)
    checkpoint = ModelCheckpoint("checkpoints", save_last=True, every_n_train_steps=every, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Tracer(), checkpoint],
    )
    last = "last" if Path("checkpoints/last.ckpt").exists() else None
    trainer.fit(Mlp(seeded=True), StatefulData(ranks), ckpt_path=last, weights_only=False)


if __name__ == "__main__":
    main()
