"""The toy with dropout, and with steps that take as long as a test needs to act in the middle of a training."""

from __future__ import annotations

import os
import time

from torch import Tensor, nn

from tests.toy import Toy


class PacedToy(Toy):
    """PACE: seconds that each step takes at least."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.net.insert(1, nn.Dropout(0.3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(float(os.environ.get("PACE", "0")))
        return super().training_step(batch, batch_idx)
