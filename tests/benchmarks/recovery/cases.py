"""Trainings whose recovery is compared to the bit: each is a config for `python -m launcher fit`."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.benchmarks.recovery.training import BATCH, PAUSE, WIDTH, Data, Mlp, Pairs, loss_of, optimizers

_HERE = __name__


class BatchNorms(Mlp):
    """The running means differ between ranks after a step; DDP sends rank zero's at the start of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(WIDTH))


class Gan(pl.LightningModule):
    """Two networks trained in turns by manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        time.sleep(PAUSE)
        first, second = self.optimizers()  # type: ignore[misc] -- two of them
        fake = self.generator(torch.randn(BATCH, 8))
        self.toggle_optimizer(second)
        loss = (self.critic(batch[0]) - 1).square().mean() + self.critic(fake.detach()).square().mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        fooled = (self.critic(self.generator(torch.randn(BATCH, 8))) - 1).square().mean()
        first.zero_grad()
        self.manual_backward(fooled)
        first.step()
        self.untoggle_optimizer(first)
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr] -- two of them
            scheduler.step()
        return {"loss": (loss + fooled).detach()}

    def configure_optimizers(self) -> Any:
        return [list(pair) for pair in zip(optimizers(self.generator), optimizers(self.critic), strict=True)]


class Plateau(Mlp):
    """The schedule follows the mean training loss of the epoch, which is kept over its batches."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        adam, _ = optimizers(self.net)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}


class Validated(Mlp):
    """Logs a metric of the validation, and keeps the best one."""

    best: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("best", torch.full((), float("inf")))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.best = torch.minimum(self.best, self.trainer.callback_metrics["val_loss"])


class ValidatedData(Data):
    """With four batches for the validation."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Pairs(self.size * 4 // 14), BATCH)


class NoisyPairs(Pairs):
    """Adds draws of three generators to each sample."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + torch.rand(WIDTH) + random.random() + np.random.rand(), y  # noqa: S311 -- no secret


class WorkersData(Data):
    """Noisy samples from two persistent workers."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(NoisyPairs(self.size), BATCH, shuffle=True, num_workers=2, persistent_workers=True)


class Average(pl.Callback):
    """A user's exponential moving average of the weights."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in pl_module.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(value.detach(), 0.1)
            else:
                self.weights[name] = value.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.weights)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = copy.deepcopy(state_dict)


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        model: its class.
        data: the class of its data.
        trainer: options of Lightning's Trainer.
        callbacks: the user's.
        settings: other config keys.
        accumulate: batches in an optimizer step.
        within: a kill comes within this many steps after the end of a batch.
        steps_of_batch: what Lightning's `global_step` counts for a batch.
    """

    model: type[pl.LightningModule] = Mlp
    data: type[Data] = Data
    trainer: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[type[pl.Callback], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    within: float = 1.0
    steps_of_batch: int = 1


CASES: Mapping[str, Case] = {
    "mlp": Case(),
    "bn": Case(BatchNorms),
    "accumulate": Case(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, accumulate=2),
    "gan": Case(Gan, settings={"strategy": "ddp_find_unused_parameters_true"}, steps_of_batch=2),
    "workers": Case(data=WorkersData),
    "fp16": Case(settings={"precision": "16-mixed"}),
    "plateau": Case(Plateau),
    "ema": Case(callbacks=(Average,)),
    "validation": Case(Validated, ValidatedData, trainer={"val_check_interval": 0.5}, within=5.0),
}


def config(case: Case, ranks: int, batches: int, every: int) -> dict[str, Any]:
    """The config file of a case.

    Args:
        case: the training.
        ranks: number of ranks.
        batches: length of the training in batches.
        every: optimizer steps between checkpoints.
    """
    callbacks = [{"class_path": f"{kind.__module__}.{kind.__name__}"} for kind in case.callbacks]
    # A rank that kills itself at the end of a batch has written it.
    callbacks.append({"class_path": "tests.benchmarks.recovery.training.Tracer"})
    callbacks.append({"class_path": "tests.benchmarks.recovery.self_kill.SelfKill"})
    steps = batches * case.steps_of_batch // case.accumulate
    return {
        "name": "run",
        "seed": 5,
        "accelerator": "cpu",
        "strategy": "ddp",
        "precision": "32-true",
        "model": {"class_path": f"{case.model.__module__}.{case.model.__name__}"},
        "data": {"class_path": f"{case.data.__module__}.{case.data.__name__}", "init_args": {"ranks": ranks}},
        "wandb": {"mode": "disabled"},
        "checkpoint": {"every_n_steps": every * case.steps_of_batch},
        **case.settings,
        "trainer": {"max_epochs": -1, "max_steps": steps, "callbacks": callbacks, **case.trainer},
    }
