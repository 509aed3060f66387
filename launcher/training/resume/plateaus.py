"""What follows a metric does in a resumed run what it does in one that nothing interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from launcher.training.callbacks.events import as_numbers

KEY = "launcher_monitored"


class StepPlateaus(pl.Callback):
    """Keeps the callback metrics, and the steps of ReduceLROnPlateau that Lightning leaves out around a resume.

    These are the one at the end of an epoch that was resumed in its middle, and the one of an epoch whose end was just
    being saved. Lightning does not save the metrics that they and EarlyStopping need; here they are in the checkpoint.

    Args:
        notice: told if a step is left out all the same.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._saved: Mapping[str, float] = {}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = as_numbers(trainer.callback_metrics)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved = checkpoint.get(KEY, {})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known: dict[str, Any] = trainer.callback_metrics
        device = trainer.strategy.root_device
        known.update({name: torch.tensor(value, device=device) for name, value in self._saved.items()
                      if name not in known})  # fmt: skip
        self._saved = {}
        if not trainer.fit_loop.resumed_on_epoch_end:
            return
        for config in _plateaus(trainer):
            if config.monitor not in known:
                self._tell(config.monitor)
            elif trainer.current_epoch % config.frequency == 0:
                pl_module.lr_scheduler_step(config.scheduler, known[config.monitor])

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fit_loop.restarting:
            return
        monitors = {config.monitor for config in _plateaus(trainer)}
        unknown = sorted(monitors - set(trainer.callback_metrics))
        if unknown:
            self._tell(", ".join(unknown))
        elif monitors:
            # The setter would say yes again where the number of steps ends the training.
            vars(trainer.fit_loop)["_restarting"] = False

    def _tell(self, metric: str) -> None:
        self._notice(f"the learning rate does not follow {metric} at the end of the epoch that was resumed: the "
                     "checkpoint does not hold it")  # fmt: skip


def _plateaus(trainer: pl.Trainer) -> list[Any]:
    """Lightning's configs of those that step at the end of an epoch."""
    return [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau
            and config.interval == "epoch" and config.monitor]  # fmt: skip
