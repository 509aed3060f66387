"""User classes with every kind of argument that LightningCLI reads; each records that it was created."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

MADE: list[str] = []


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass
class Sizes:
    width: int = 8
    depth: int = 1
    marks: list[str] = field(default_factory=lambda: ["m"])


class ZooEncoder(nn.Module):
    def __init__(
        self,
        width: int = 8,
        act: type[nn.Module] = nn.ReLU,
        inner: nn.Module | None = None,
        names: list[str] = ["e"],  # noqa: B006 -- as users write it
    ) -> None:
        super().__init__()
        MADE.append("ZooEncoder")
        self.width = width
        self.names = names
        self.act = act()
        self.inner = inner
        self.net = nn.Linear(4, width)


class DeepZooEncoder(ZooEncoder):
    def __init__(self, depth: int = 2, **more: Any) -> None:
        super().__init__(**more)
        self.depth = depth


class Net(pl.LightningModule):
    def __init__(
        self,
        width: int = 8,
        lr: float = 0.1,
        name: str = "net",
        flag: bool = False,
        sizes: list[int] | None = None,
        weights: dict[str, float] | None = None,
        pair: tuple[int, float] = (1, 0.5),
        mode: Mode = Mode.FAST,
        kind: Literal["a", "b"] = "a",
        path: Path | None = None,
        shape: Sizes = Sizes(),  # noqa: B008 -- as users write it
        encoder: nn.Module | None = None,
        blocks: list[nn.Module] | None = None,
        act: Callable[[], nn.Module] = nn.ReLU,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
        untyped=3,
    ) -> None:
        super().__init__()
        MADE.append("Net")
        self.save_hyperparameters()
        self.given = [width, lr, name, flag, sizes, weights, pair, mode, kind, path, shape, untyped]
        self.encoder = encoder
        self.blocks = nn.ModuleList(blocks or [])
        self.act = act()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        made = self.optimizer(self.parameters())
        return {"optimizer": made, "lr_scheduler": self.scheduler(made)}


class Plain(pl.LightningModule):
    """Without an optimizer, and with a first parameter not named `self`."""

    def __init__(s, d: int = 8) -> None:  # noqa: N805 -- as users write it
        super().__init__()
        s.d = d
        s.layer = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = ((self.layer(batch[0]) - 1) ** 2).mean()
        self.log("loss", loss)
        return loss


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, folder: Path = Path(), **more: Any) -> None:
        super().__init__()
        MADE.append("Data")
        self.save_hyperparameters()
        self.batch_size, self.folder, self.more = batch_size, folder, more

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(16, 4)), batch_size=self.batch_size)


class Own(pl.Callback):
    def __init__(
        self,
        every: int = 1,
        part: nn.Module | None = None,
        names: list[str] = ["o"],  # noqa: B006 -- as users write it
    ) -> None:
        MADE.append("Own")
        self.every, self.part, self.names = every, part, names


class Wide(Net):
    def __init__(self, width: int = 32, extra: int = 1) -> None:
        super().__init__(width)
        self.extra = extra
