"""Schedulers that follow a metric, at the end of an epoch that was resumed in its middle."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from typing_extensions import override


class StepPlateaus(pl.Callback):
    """Lets ReduceLROnPlateau take its step at the end of a resumed epoch, as it would have without the interruption.

    Lightning leaves that step out, as the metric might not be known again; here it is left out only if that is so.

    Args:
        notice: told if a step is left out.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fit_loop.restarting:
            return
        monitors = {
            config.monitor
            for config in trainer.lr_scheduler_configs
            if config.reduce_on_plateau and config.interval == "epoch" and config.monitor
        }
        unknown = sorted(monitors - set(trainer.callback_metrics))
        if unknown:
            self._notice(
                f"the learning rate does not follow {', '.join(unknown)} at the end of this epoch: it was resumed in "
                "its middle, and the metric has not been computed since"
            )
        elif monitors:
            # The setter would say yes again where the number of steps ends the training.
            vars(trainer.fit_loop)["_restarting"] = False
