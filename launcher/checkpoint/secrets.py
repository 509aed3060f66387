"""Checkpoints are handed on: the secrets among the hyperparameters that Lightning stores in them are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
from typing_extensions import override

from launcher.core.secrets import find_secrets, redact

_HYPERPARAMETERS = (pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)


def hide_hyperparameters(checkpoint: dict[str, Any]) -> list[str]:
    """Take the secrets out of a checkpoint's hyperparameters, in place; what is not secret stays the same object.

    Returns:
        Dotted paths of the secrets.
    """
    hidden: list[str] = []
    for key in _HYPERPARAMETERS:
        values = checkpoint.get(key)
        found = find_secrets(values) if isinstance(values, Mapping) else {}
        if found:
            given = cast("Mapping[str, Any]", values)
            checkpoint[key] = {k: redact({k: v})[k] if find_secrets({k: v}) else v for k, v in given.items()}
            hidden += found
    return hidden


class SecretRedactor(pl.Callback):
    """Does so at each save, whatever the strategy.

    Args:
        notice: told once, as `load_from_checkpoint` needs such a value again.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._told = False

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        hidden = hide_hyperparameters(checkpoint)
        if hidden and not self._told:
            self._told = True
            name = hidden[0].partition(".")[0]
            self._notice(
                f"checkpoints keep no secret: hyperparameter {', '.join(hidden)} is hidden in them; "
                f"give it again: load_from_checkpoint(PATH, {name}=...)"
            )
