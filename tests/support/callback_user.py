"""A user's program with Lightning's callbacks, trained by Lightning's own Trainer or by the launcher.

    python -m tests.support.callback_user plain|launcher RANKS GROUP...

Writes a line of JSON for each rank and group: steps, epochs, parameters, and what the user's own CSV file holds.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from tests.support.logged_rows import users_rows

_open: list[Any] = []


class OwnRows(pl.Callback):
    """Writes its own file on each rank, and never closes it."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _open.append(open(f"rows-{trainer.global_rank}.csv", "w", newline=""))  # noqa: PTH123, SIM115

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        csv.writer(_open[0]).writerow([trainer.global_step])


class Net(pl.LightningModule):
    """A backbone and a head; with `use_logger`, all logger methods that users call, on every rank."""

    def __init__(self, lr: float = 0.05, use_logger: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.batch_size = 4
        self.use_logger = use_logger
        self.backbone = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def _loss(self, x: Tensor) -> Tensor:
        return ((self.head(torch.tanh(self.backbone(x))) - x.sum(1, keepdim=True)) ** 2).mean()

    def on_fit_start(self) -> None:
        logger: Any = self.logger
        if self.use_logger:
            logger.watch(self)
            logger.log_hyperparams({"mine": 1})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch[0])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch[0]), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        logger: Any = self.logger
        if self.use_logger:
            logger.log_metrics({"by_hand": 1.0}, step=self.global_step)
            logger.experiment.log({"experiment": 1.0})
            logger.log_table("table", columns=["a"], data=[[1]])
            logger.log_text("text", columns=["a"], data=[["b"]])
            logger.log_image("image", [np.zeros((2, 2, 3), dtype=np.uint8)])
            assert self.trainer.log_dir, "it is a broadcast: every rank has to take part"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._samples = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._samples, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._samples, batch_size=self.batch_size)


class Writer(callbacks.BasePredictionWriter):
    """Writes nothing during a fit, which does not predict."""

    def __init__(self) -> None:
        super().__init__("epoch")


class Freeze(callbacks.BaseFinetuning):
    """Trains the backbone from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.get_submodule("backbone"))

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.get_submodule("backbone"), optimizer)


class Bar(callbacks.ProgressBar):
    """A user's progress bar."""

    def disable(self) -> None:
        pass

    def enable(self) -> None:
        pass


def _begun(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    del module
    trainer.loggers[0].log_metrics({"begun": 1.0})


def make_group(name: str) -> list[pl.Callback]:
    """New callbacks that are used together in one training."""
    made: dict[str, Any] = {
        "watch": lambda: [
            callbacks.LearningRateMonitor(),
            callbacks.DeviceStatsMonitor(cpu_stats=True),
            callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0])),
            callbacks.Timer("00:01:00:00"),
            callbacks.EarlyStopping("val_loss", patience=5),
            callbacks.LambdaCallback(on_train_start=_begun),
            callbacks.ModelSummary(2),
            callbacks.TQDMProgressBar(),
            callbacks.ModelCheckpoint(),
            callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=2, filename="{epoch}-mine", save_last="link"),
            callbacks.ModelCheckpoint(every_n_train_steps=3, save_top_k=-1, dirpath="kept", save_weights_only=True),
            callbacks.OnExceptionCheckpoint("failed"),
            callbacks.EMAWeightAveraging(),
            Writer(),
            callbacks.Callback(),
        ],
        "average": lambda: [
            callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1),
            callbacks.RichProgressBar(),
            callbacks.RichModelSummary(),
            callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
        ],
        "weights": lambda: [callbacks.WeightAveraging(), Bar()],
        "freeze": lambda: [Freeze(), callbacks.LearningRateMonitor(logging_interval="step")],
        "backbone": lambda: [callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
        "prune": lambda: [callbacks.ModelPruning("l1_unstructured", amount=0.5)],
        "rate": lambda: [callbacks.LearningRateFinder(num_training_steps=4)],
        # Lightning does not support it on several ranks.
        "batch": lambda: [callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=2)],
        # Its state cannot be saved, also not with Lightning's Trainer.
        "spike": lambda: [callbacks.SpikeDetection(warmup=1000)],
    }
    return made[name]()


GROUPS = ("watch", "average", "weights", "freeze", "backbone", "prune", "rate", "batch", "spike")


def train(kind: str, ranks: int, group: str) -> pl.Trainer:
    pl.seed_everything(42, verbose=False)
    options: dict[str, Any] = {"max_epochs": 3, "log_every_n_steps": 2, "enable_checkpointing": group != "spike"}
    logger = CSVLogger(f"{kind}-{group}", version="one")
    if kind == "plain":
        trainer = pl.Trainer(**options, accelerator="cpu", devices=ranks, logger=logger, callbacks=make_group(group))
        trainer.fit(Net(), Data())
        return trainer
    from launcher import TrainingCoordinator
    from launcher.config.schema import WandbOptions

    coordinator = TrainingCoordinator("runs", False, "32", None, devices=ranks, callbacks=make_group(group),
                                      loggers=[logger], wandb=WandbOptions("disabled"))  # fmt: skip
    return coordinator.train(Net(), Data(), name=group, **options)["trainer"]


def _logged(group: str, kind: str) -> list[dict[str, str]]:
    return users_rows(Path(f"{kind}-{group}/lightning_logs/one/metrics.csv"))


def main(arguments: Sequence[str]) -> None:
    kind, ranks, *groups = arguments
    for group in groups:
        trainer = train(kind, int(ranks), group)
        found = {
            "group": group,
            "rank": trainer.global_rank,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "loggers": [type(each).__name__ for each in trainer.loggers],
            "parameters": [p.tolist() for p in trainer.lightning_module.parameters()],
            "rows": _logged(group, kind) if trainer.is_global_zero else None,
        }
        # One write, so that the lines of the ranks do not mix.
        sys.stdout.write(f"FOUND {json.dumps(found)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
