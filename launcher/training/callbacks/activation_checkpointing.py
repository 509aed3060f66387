"""Activation checkpointing under every strategy, if the plan has it."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from typing_extensions import override

from strategies.block_checkpoints import checkpoint_blocks


class ActivationCheckpointing(pl.Callback):
    """Checkpoints the model's blocks when the strategy has prepared them.

    Args:
        wrap: the config's `fsdp.wrap`.
    """

    def __init__(self, wrap: Sequence[str]) -> None:
        self._wrap = tuple(wrap)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        checkpoint_blocks(pl_module, self._wrap)
