"""Begins the W&B run with the fit, and writes plan and model into its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from launcher.core.errors import describe_error
from launcher.loggers.wandb_run import QueuedWandbLogger


def leave_to_user(config: Any, names: Iterable[str]) -> None:
    """Let the user's code set these keys to other values: W&B raises if the config has a different value.

    W&B's server keeps the launcher's values until then.
    """
    items: dict[str, Any] = vars(config).get("_items", {})
    for name in names:
        items.pop(name, None)


class WandbStarter(pl.Callback):
    """Begins the run of the Trainer's first `WandbLogger`, before the loss scale's first row, and adds to its config.

    A user's run keeps the keys that its config already has. Values that the user sets later replace the launcher's.

    Args:
        values: config and plan, as plain values; the launcher's run has them from its start.
        described: facts of the model, from `launcher.loggers.wandb_config.build_wandb_config`.
        notice: receives the error if W&B does not accept them.
    """

    def __init__(self, values: Mapping[str, Any], described: Mapping[str, Any], notice: Callable[[str], None]) -> None:
        self._values = values
        self._described = described
        self._notice = notice

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = next((each for each in trainer.loggers if isinstance(each, WandbLogger)), None)
        if logger is None or not trainer.is_global_zero:
            return
        is_launchers = isinstance(logger, QueuedWandbLogger)
        if is_launchers and logger.mode == "disabled":
            return
        experiment = logger.experiment
        try:
            config = experiment.config
            if is_launchers and logger.is_own:
                # A resumed run may have been trained on another number of ranks.
                more = dict(self._described)
            else:
                taken = set(config.keys())
                more = {k: v for k, v in {**self._values, **self._described}.items() if k not in taken}
            config.update(more, allow_val_change=True)
            leave_to_user(config, {**self._values, **more} if is_launchers and logger.is_own else more)
        except Exception as error:  # noqa: BLE001 -- W&B raises many kinds, and none may stop a training
            self._notice(f"W&B did not accept the model's config: {describe_error(error)}")
