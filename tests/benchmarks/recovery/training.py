"""The training that all contestants share: an MLP with dropout, Adam and StepLR, about 25 ms a step on one core.

`PAUSE` of a step is a sleep, so that a step takes nearly the same time whatever else the machine does.
"""

from __future__ import annotations

import time
import weakref
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.benchmarks.recovery import trace

WIDTH, BATCH, BATCHES = 256, 16, 14
PAUSE = 0.015


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Fixed random inputs and targets."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, WIDTH, generator=generator)
        self.y = torch.tanh(self.x @ torch.randn(WIDTH, 4, generator=generator) / WIDTH**0.5)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def network() -> nn.Sequential:
    """The MLP, with the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1)]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 4))


def optimizers(net: nn.Module) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.StepLR]:
    """Adam, and a schedule by steps."""
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    return adam, torch.optim.lr_scheduler.StepLR(adam, step_size=5, gamma=0.9)


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor], pause: float = PAUSE) -> Tensor:
    """The loss of a batch, after the sleep."""
    time.sleep(pause)
    return (net(batch[0]) - batch[1]).square().mean()


class Mlp(pl.LightningModule):
    """The MLP under Lightning.

    Args:
        pause: seconds that a step sleeps.
        seeded: draw dropout from a seed of step and rank; plain Lightning needs it for the same curve after a resume.
    """

    def __init__(self, pause: float = PAUSE, seeded: bool = False) -> None:
        super().__init__()
        self.net, self.pause, self.seeded = network(), pause, seeded

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.seeded:
            torch.manual_seed(self.global_step * 1000 + self.global_rank)
        return loss_of(self.net, batch, self.pause)

    def configure_optimizers(self) -> Any:
        adam, schedule = optimizers(self.net)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(pl.LightningDataModule):
    """`BATCHES` batches of `BATCH` samples for each rank in an epoch, shuffled.

    Args:
        ranks: number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.size = ranks * BATCH * BATCHES

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Pairs(self.size), BATCH, shuffle=True)


class GroupCount:
    """Numbers the process groups that this process has had; keeps none alive."""

    def __init__(self) -> None:
        self._last: Any = None
        self._count = 0

    def now(self) -> int:
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is not None and (self._last is None or self._last() is not group):
            self._last = weakref.ref(group)
            self._count += 1
        return self._count


class Tracer(pl.Callback):
    """Writes the trace of a Lightning training."""

    def __init__(self) -> None:
        self._groups = GroupCount()
        self._before = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._before = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        trace.append(
            trainer.global_rank,
            self._groups.now(),
            (trainer.current_epoch, batch_idx),
            finished=trainer.global_step > self._before,
            loss=float(loss),
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        states: dict[str, Any] = {
            "parameters": dict(pl_module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
            "generators": trace.generators(),
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            states["scaler"] = scaler.state_dict()
        for callback in trainer.callbacks:  # type: ignore[attr-defined] -- Lightning sets it in its connector
            if type(callback).__module__.startswith("tests.benchmarks.recovery") and callback.state_dict():
                states[type(callback).__name__] = callback.state_dict()
        trace.write_final(trainer.global_rank, states)
