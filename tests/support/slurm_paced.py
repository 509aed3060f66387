"""The toy with dropout, and with slow steps, so that a test can act in the middle of a training."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torch import Tensor, nn

from tests.support.processes import session_processes
from tests.support.toy import Toy


class PacedToy(Toy):
    """PACE: minimum seconds of each step, or the path of a file with that number, if it exists.

    The file is read repeatedly, so a held step ends when the number changes.
    """

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.net.insert(1, nn.Dropout(0.3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        began = time.monotonic()
        while (left := _pace(os.environ.get("PACE", "0")) - (time.monotonic() - began)) > 0:
            time.sleep(min(left, 0.05))
        return super().training_step(batch, batch_idx)


def _pace(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        try:
            return float(Path(given).read_text())
        except FileNotFoundError:
            return 0.0


class Scheduled(PacedToy):
    """In step `term_at` every process of the session receives SIGTERM once, as from a scheduler."""

    def __init__(self, lr: float = 0.05, term_at: int = -1) -> None:
        super().__init__(lr)
        self.term_at = term_at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.term_at and self.global_rank == 0:
            # The sender is not the parent of the loader workers.
            if os.fork() == 0:
                for pid, _ in session_processes(os.getsid(0)):
                    if pid != os.getpid():
                        os.kill(pid, signal.SIGTERM)
                os._exit(0)
            os.wait()
        return super().training_step(batch, batch_idx)
