"""Removes secrets from the hyperparameters in a checkpoint, as checkpoints are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
from typing_extensions import override

from launcher.core.secrets import find_secrets, redact

_HYPERPARAMETERS = (pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)


def hide_hyperparameters(checkpoint: dict[str, Any]) -> list[str]:
    """Redact the secrets in a checkpoint's hyperparameters, in place, and return the dotted paths of the secrets."""
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
    """Redacts secrets at each save, with every strategy."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._has_notified = False

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        hidden = hide_hyperparameters(checkpoint)
        if hidden and not self._has_notified:
            self._has_notified = True
            name = hidden[0].partition(".")[0]
            self._notice(
                f"checkpoints contain no secrets: hyperparameter {', '.join(hidden)} is redacted; "
                f"give it when you load one: load_from_checkpoint(PATH, {name}=...)"
            )
