"""A module that asks for more memory than any machine has, in its third step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.toy import Toy


class Hungry(Toy):
    """`content_from`: the ZeRO stage from which on it asks for nothing; without ZeRO it is at stage 0."""

    def __init__(self, lr: float = 0.05, content_from: int = 4, width: int = 8) -> None:
        super().__init__(lr=lr)
        self.content_from = content_from
        # Much of it, in parts that fit a bucket, is worth ZeRO.
        self.ballast = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(12))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 2 and self._stage() < self.content_from:
            torch.zeros(1 << 55)
        return super().training_step(batch, batch_idx) + 1e-6 * self._ballast_norm()

    def _ballast_norm(self) -> Tensor:
        norms = [parameter.square().sum() for parameter in self.ballast.parameters()]
        return torch.stack(norms).sum()

    def _stage(self) -> int:
        config = getattr(self.trainer.strategy, "config", None) or {}
        return int(config.get("zero_optimization", {}).get("stage", 0))
