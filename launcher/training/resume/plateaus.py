"""Steps schedulers that follow a metric in a resumed run as in an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from launcher.training.callbacks.progress import as_numbers

KEY = "launcher_monitored"


class StepPlateaus(pl.Callback):
    """Saves the callback metrics, and makes the steps of ReduceLROnPlateau that Lightning skips around a resume.

    Lightning skips the step at the end of an epoch that was resumed in its middle or saved at its end, and does not
    save the metrics that these steps and EarlyStopping need.
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
                self._notify_skipped(config.monitor)
            elif trainer.current_epoch % config.frequency == 0:
                pl_module.lr_scheduler_step(config.scheduler, known[config.monitor])

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fit_loop.restarting:
            return
        monitors = {config.monitor for config in _plateaus(trainer)}
        unknown = sorted(monitors - set(trainer.callback_metrics))
        if unknown:
            self._notify_skipped(", ".join(unknown))
        elif monitors:
            # Lightning's setter always sets True if max_steps is given.
            vars(trainer.fit_loop)["_restarting"] = False

    def _notify_skipped(self, metric: str) -> None:
        self._notice(f"the learning rate does not follow {metric} at the end of the resumed epoch: the checkpoint "
                     "does not contain this metric")  # fmt: skip


def _plateaus(trainer: pl.Trainer) -> list[Any]:
    """The configs of ReduceLROnPlateau schedulers that step at the end of an epoch."""
    return [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau
            and config.interval == "epoch" and config.monitor]  # fmt: skip
