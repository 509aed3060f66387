"""Model and data of a new user, without the launcher. Each rank writes its samples to TRACE."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is (i, eight numbers that depend on i alone)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(index), torch.randn(8, generator=torch.Generator().manual_seed(index))


class ToyData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, size: int = 64, workers: int = 0, persistent: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.size = size
        self.workers = workers
        self.persistent = persistent

    def train_dataloader(self) -> DataLoader[Any]:
        return self._shuffled(Numbers(self.size))

    def _shuffled(self, dataset: Numbers) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True, num_workers=self.workers,
                          persistent_workers=self.persistent)  # fmt: skip


class Toy(pl.LightningModule):
    """Regression with a two-layer net.

    `signal_at` and `kill_at`: the step in which rank `by_rank` receives a signal, or kills itself, once.
    """

    static_graph = True

    def __init__(
        self,
        lr: float = 0.05,
        signal_at: int = -1,
        kill_at: int = -1,
        raise_at: int = -1,
        by_rank: int = 0,
        signal_number: int = signal.SIGINT,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.signal_at, self.kill_at, self.raise_at, self.by_rank = signal_at, kill_at, raise_at, by_rank
        self.signal_number = signal_number
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        index, x = batch
        loss = ((self.net(x).squeeze(-1) - x.sum(-1)) ** 2).mean()
        self.log("loss", loss)
        self._trace(index, loss)
        if self.global_rank == self.by_rank:
            self._hurt()
        return loss

    def _trace(self, samples: Tensor, loss: Tensor) -> None:
        trace = os.environ.get("TRACE")
        if trace and not self.trainer.sanity_checking:
            with Path(f"{trace}-{self.global_rank}").open("a") as file:
                file.write(json.dumps([self.global_step, samples.tolist(), loss.item()]) + "\n")

    def _hurt(self) -> None:
        if self.global_step == self.signal_at:
            os.kill(os.getpid(), self.signal_number)
        if self.global_step == self.raise_at:
            raise ValueError("the user's own mistake")
        mark = Path(os.environ.get("TRACE", ".") + "-killed")
        if self.global_step == self.kill_at and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self) -> Any:
        # Reads the number of steps, as schedulers do; Lightning then creates the loaders early.
        total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.5 * step / max(float(total), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class NoisyData(ToyData):
    """Adds draws of three generators to each sample; has eight validation samples."""

    def train_dataloader(self) -> DataLoader[Any]:
        return self._shuffled(NoisyNumbers(self.size))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Numbers(8), batch_size=4)


class NoisyNumbers(Numbers):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number, x = super().__getitem__(index)
        return number, x + torch.rand(8) + random.random() + np.random.rand()  # noqa: S311 -- no secret


class Noisy(Toy):
    """With dropout, an average kept in a hook, and a plateau scheduler on the validation loss.

    Traces validations as sample -1.
    """

    average: Tensor

    def __init__(
        self, lr: float = 0.05, signal_at: int = -1, kill_at: int = -1, signal_number: int = signal.SIGINT
    ) -> None:
        super().__init__(lr, signal_at, kill_at, signal_number=signal_number)
        self.net.insert(1, nn.Dropout(0.3))
        self.register_buffer("average", torch.zeros(()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.lerp_(self.net[-1].bias.detach().mean(), 0.5)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = ((self.net(batch[1]).squeeze(-1) - batch[1].sum(-1)) ** 2).mean() + self.average
        self.log("val_loss", loss)
        self._trace(torch.tensor([-1]), loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class NoModule:
    """Not a LightningModule."""


class Probe(pl.Callback):
    """Writes to PROBE the Trainer's precision, the dtype of a product, and the loss scale."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        with trainer.precision_plugin.forward_context():
            weight = next(pl_module.parameters())
            product = (weight @ weight.T).dtype
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.get_scale()
        line = json.dumps([trainer.precision, str(product), scale, type(trainer.strategy).__name__])
        Path(os.environ["PROBE"]).write_text(line)
