"""torchao's fp8 layers, computed as on a GPU that has no fp8: their weights gather themselves as fp8 under FSDP2."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchao.float8 import Float8LinearConfig, convert_to_float8_training


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Model(pl.LightningModule):
    """Three blocks of fp8 layers."""

    def __init__(self, lr: float = 0.001) -> None:
        super().__init__()
        self.lr = lr
        self.enter, self.head = nn.Linear(32, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.is_converted = False

    def configure_model(self) -> None:
        if not self.is_converted:
            self.is_converted = True
            config = Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True)
            convert_to_float8_training(self, config=config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Data(pl.LightningDataModule):
    """128 vectors."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        values = torch.Generator().manual_seed(0)
        x, y = torch.randn(128, 32, generator=values), torch.randn(128, 16, generator=values)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)
