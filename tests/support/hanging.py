"""A training that hangs on purpose: `fault` happens to rank `by_rank` in step `at`, and lasts forever or `seconds`.

Several faults with commas between happen one after the other, each `at` steps after the one before.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from typing_extensions import override

_FOREVER = 10_000.0


def _mark() -> None:
    """Write when the fault begins, for a benchmark."""
    path = os.environ.get("HANG_MARK")
    if path:
        Path(path).write_text(str(time.time()))


class Samples(Dataset[Tensor]):
    """Reading sample `at` on this rank blocks in a worker of the loader."""

    def __init__(self, size: int, at: int = -1) -> None:
        self.size, self.at = size, at

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if get_worker_info() is not None and index == self.at:
            _mark()
            lock = multiprocessing.Lock()
            lock.acquire()
            lock.acquire()
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


class Uneven(IterableDataset[Tensor]):
    """Batches of a rank end after `batches`."""

    def __init__(self, batches: int, mark: bool) -> None:
        self.batches, self.mark = batches, mark

    def __iter__(self) -> Any:
        for index in range(self.batches):
            yield torch.randn(4, 8, generator=torch.Generator().manual_seed(index))
        if self.mark:
            _mark()


class HangingData(pl.LightningDataModule):
    def __init__(self, fault: str = "none", at: int = 20, by_rank: int = 1, batches: int = 100_000) -> None:
        super().__init__()
        self.fault, self.at, self.by_rank, self.batches = fault, at, by_rank, batches

    def train_dataloader(self) -> DataLoader[Any]:
        is_it = int(os.environ.get("RANK", "0")) == self.by_rank
        if self.fault == "uneven":
            return DataLoader(Uneven(self.at if is_it else self.batches, is_it), batch_size=None)
        if self.fault == "loader":
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            # The sample of the wanted step on this rank, as the distributed sampler without shuffling divides them.
            at = self.at * 4 * world + rank if rank == self.by_rank else -1
            return DataLoader(Samples(self.batches * 4, at), batch_size=4, num_workers=1)
        return DataLoader(Samples(self.batches * 4), batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Samples(16), batch_size=4)


class Hanging(pl.LightningModule):
    """A regression with a step of `pace` seconds."""

    static_graph = True

    def __init__(
        self, fault: str = "none", at: int = 20, by_rank: int = 1, pace: float = 0.02, seconds: float = _FOREVER
    ) -> None:
        super().__init__()
        self.fault, self.at, self.by_rank, self.pace, self.seconds = fault, at, by_rank, pace, seconds
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self._done: set[int] = set()

    def _fails(self, fault: str) -> bool:
        number, rest = divmod(self.global_step, max(self.at, 1))
        wanted = self.fault.split(",")
        is_now = rest == 0 and 1 <= number <= len(wanted) and wanted[number - 1] == fault
        if not is_now or self.global_rank != self.by_rank or number in self._done:
            return False
        self._done.add(number)
        _mark()
        return True

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.pace)
        if self._fails("stop"):
            stop_for(self.seconds)
        if self._fails("sleep_step"):
            threading.Event().wait(self.seconds)
        if self._fails("gather"):
            dist.all_gather_object([None] * self.trainer.world_size, self.global_rank)
        if self._fails("barrier"):
            dist.barrier()
        if self._fails("write"):
            self._write_to_a_pipe()
        if self._fails("busy"):
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:
                pass
        return (self.net(batch).squeeze(-1) - batch.sum(-1)).pow(2).mean()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        if self._fails("sleep_hook"):
            time.sleep(self.seconds)
        if self._fails("write_hook"):
            self._write_to_a_pipe()

    def on_train_epoch_end(self) -> None:
        if self.fault == "uneven" and dist.is_initialized():
            # As users average a metric by hand.
            dist.all_reduce(torch.zeros(3, 5))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(self.pace)

    def _write_to_a_pipe(self) -> None:
        path = Path(self.trainer.default_root_dir) / f"pipe-{os.getpid()}"
        os.mkfifo(path)
        with path.open("wb") as file:
            file.write(b"x")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def stop_for(seconds: float) -> None:
    """Stop this process; another one continues it."""
    if seconds < _FOREVER:
        code = f"import os, signal, time; time.sleep({seconds}); os.kill({os.getpid()}, signal.SIGCONT)"
        subprocess.Popen([sys.executable, "-c", code])
    os.kill(os.getpid(), signal.SIGSTOP)


class Slow(Hanging):
    """Slow in many ways, but never hung: batches up to 8 s, validations up to 40 s, checkpoints up to 10 s.

    The ranks draw different slow batches, so each waits for the other; a validation is slow in its batches or at its
    end; rank zero writes slowly.
    """

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self._draw().random() < 0.01:
            time.sleep(self._draw().uniform(0.5, 8.0))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            time.sleep(self._draw().uniform(0.0, 5.0))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            time.sleep(self._draw().uniform(0.0, 20.0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank == 0:
            time.sleep(self._draw().uniform(0.0, float(os.environ.get("SLOW_SAVES", "0"))))

    def _draw(self) -> random.Random:
        if not hasattr(self, "_random"):
            self._random = random.Random(self.global_rank)  # noqa: S311 -- no secret
        return self._random
