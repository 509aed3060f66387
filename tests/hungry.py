"""A module that asks for more memory than any machine has, in its third step."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.toy import Toy


class Hungry(Toy):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 2:
            torch.zeros(1 << 55)
        return super().training_step(batch, batch_idx)
