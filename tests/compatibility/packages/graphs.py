"""torch_geometric's LightningDataset over its FakeDataset, and a two-layer graph network."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.datasets import FakeDataset
from torch_geometric.nn import GCNConv, global_mean_pool


class Data(LightningDataset):
    """Forty graphs of about ten nodes."""

    def __init__(self, batch_size: int = 8) -> None:
        torch.manual_seed(0)
        graphs = FakeDataset(num_graphs=48, avg_num_nodes=10, avg_degree=3, num_channels=8, num_classes=3, task="graph")
        super().__init__(graphs[:40], graphs[40:], batch_size=batch_size, num_workers=0, pin_memory=False)


class Model(pl.LightningModule):
    """Classifies graphs."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.first, self.second, self.head = GCNConv(8, 16), GCNConv(16, 16), nn.Linear(16, 3)

    def forward(self, batch: Any) -> Tensor:
        found = self.first(batch.x, batch.edge_index).relu()
        return self.head(global_mean_pool(self.second(found, batch.edge_index).relu(), batch.batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch), batch.y)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch), batch.y), batch_size=batch.num_graphs)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)
