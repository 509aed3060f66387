"""Which parameters a finetuning has unfrozen, in the checkpoint and back: Lightning freezes them at each start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

KEY = "launcher_trained_parameters"


class TrainedParameters(pl.Callback):
    """Saves what training has changed of `requires_grad`, and restores it for `BaseFinetuning` callbacks.

    Elsewhere the program says what is trained: it may have been changed on purpose. There a difference is told.

    Args:
        notice: told of it.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        # As the program has made them.
        self._made: Mapping[str, bool] = {}
        self._saved: Mapping[str, bool] = {}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Before anything is restored, so that the next checkpoint has it again.
        self._made = flags_of(pl_module)
        self._saved = checkpoint.get(KEY, {})
        if any(isinstance(each, BaseFinetuning) for each in cast(Any, trainer).callbacks):
            # Now: DDP exchanges the gradients of what is trained where it is made.
            set_flags(pl_module, self._saved)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._made = self._made or flags_of(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = flags_of(pl_module)
        others = [name for name, trained in self._saved.items() if now.get(name, trained) != trained]
        # In manual optimization a step may freeze for itself.
        if others and pl_module.automatic_optimization:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            was, is_now = ("trained", "frozen") if self._saved[others[0]] else ("frozen", "trained")
            self._notice(
                f"{others[0]}{more} was {was} when the checkpoint was saved and is {is_now} now: training had changed "
                "requires_grad, which a resume restores for callbacks of BaseFinetuning only; set it in on_train_start"
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        now = flags_of(pl_module)
        changed = {
            name: flag for name, flag in now.items() if name in self._saved or self._made.get(name, flag) != flag
        }
        if changed:
            checkpoint[KEY] = changed


def flags_of(module: nn.Module) -> dict[str, bool]:
    """`requires_grad` of the parameters, and `track_running_stats` of batch norms, which freezing changes, too."""
    norms = {name: part.track_running_stats for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    return {**norms, **{name: parameter.requires_grad for name, parameter in module.named_parameters()}}


def set_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """The inverse of `flags_of`; names that the module does not have are left out."""
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and name in flags:
            part.track_running_stats = flags[name]
    for name, parameter in module.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])
