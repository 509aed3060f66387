"""A model with everything that a rank has alone: dropout, batch norm, metrics of an epoch, an average, a plateau."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tests.support.toy import Toy


class Kept(Toy):
    """As `Toy`, which kills rank `by_rank` in step `kill_at`; the trace has the loss of each step.

    Its rank ends after the forward pass: the others lose it in their backward pass.
    """

    static_graph = False

    def __init__(self, kill_at: int = -1, by_rank: int = 0) -> None:
        super().__init__(kill_at=kill_at, by_rank=by_rank)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.register_buffer("mask", torch.ones(16))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "epoch_loss"}}


class Average(pl.Callback):
    """An average of the parameters, changed in place after each batch; a callback of a user."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = [parameter.detach() for parameter in pl_module.parameters()]
        self.average = self.average or [torch.zeros_like(each) for each in now]
        torch._foreach_lerp_(self.average, now, 0.1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sums = [float(each.double().sum()) for each in self.average]
        pl_module._trace(torch.tensor([-1 - self.batches]), torch.tensor(sum(sums), dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.batches = state_dict["average"], state_dict["batches"]
