"""A model and data with a slow start, loader, validation and checkpoint; one rank kills itself once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support.toy import Numbers, Toy

# Seconds of each part, each time.
START, BATCH, VALIDATION, SAVE = 0.3, 0.02, 0.1, 0.1


class _SlowLoader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            time.sleep(BATCH)
            yield batch


class SlowData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return _SlowLoader(Numbers(64), batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Numbers(4), batch_size=2)


class SlowParts(Toy):
    def __init__(self) -> None:
        super().__init__()
        time.sleep(START)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        mark = Path(os.environ["TRACE"] + "-killed")
        if (self.global_rank, self.global_step) == (1, 14) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        time.sleep(VALIDATION)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        time.sleep(SAVE)
