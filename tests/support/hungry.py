"""A module that allocates more memory than any machine has, in its third step."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from tests.support.toy import Toy


class Hungry(Toy):
    """`content_from`: the ZeRO stage from which on it does not; FSDP2 counts as stage 3, other strategies as 0."""

    def __init__(self, lr: float = 0.05, content_from: int = 4, width: int = 8) -> None:
        super().__init__(lr=lr)
        self.content_from = content_from
        # Large enough for ZeRO, in parts that fit a bucket.
        self.ballast = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(12))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 2 and self._stage() < self.content_from:
            torch.zeros(1 << 55)
        return super().training_step(batch, batch_idx) + self._carry(batch[1])

    def _carry(self, x: Tensor) -> Tensor:
        """Call the modules, because ZeRO-3 gathers weights only there."""
        carried = x.new_ones(1, self.ballast[0].in_features)
        for layer in self.ballast:
            carried = layer(carried)
        return 1e-6 * carried.sum()

    def _stage(self) -> int:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            return 3
        config = getattr(self.trainer.strategy, "config", None) or {}
        return int(config.get("zero_optimization", {}).get("stage", 0))


class HungryBlocks(Toy):
    """It allocates as much, unless the activations of its blocks are computed again."""

    def __init__(self, lr: float = 0.05, width: int = 8192) -> None:
        super().__init__(lr=lr)
        self.blocks = nn.Sequential(*(WideLayers(width) for _ in range(4)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 2 and not any("forward" in vars(part) for part in self.blocks.modules()):
            torch.zeros(1 << 55)
        rows = batch[1].new_ones(1024, 64)
        return super().training_step(batch, batch_idx) + 1e-6 * self.blocks(rows).mean()


class WideLayers(nn.Module):
    """A block whose activations are larger than its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))
