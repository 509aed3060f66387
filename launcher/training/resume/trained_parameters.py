"""Saves and restores which parameters a finetuning has unfrozen: Lightning freezes them at each start."""

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
    """Saves changes of `requires_grad` during the training, and restores them for `BaseFinetuning` callbacks.

    Without such a callback the user's code decides which parameters are trained, and may have been changed since. Then
    a notice describes the difference.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        # Before the training changed them.
        self._made: Mapping[str, bool] = {}
        self._saved: Mapping[str, bool] = {}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Before anything is restored, so that the next checkpoint contains the same changes.
        self._made = read_flags(pl_module)
        self._saved = checkpoint.get(KEY, {})
        if any(isinstance(each, BaseFinetuning) for each in cast(Any, trainer).callbacks):
            # Already here: DDP registers the trained parameters when it wraps the module.
            set_flags(pl_module, self._saved)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._made = self._made or read_flags(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = read_flags(pl_module)
        others = [name for name, trained in self._saved.items() if now.get(name, trained) != trained]
        # With manual optimization a step may freeze parameters itself.
        if others and pl_module.automatic_optimization:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            was, is_now = ("trained", "frozen") if self._saved[others[0]] else ("frozen", "trained")
            self._notice(
                f"{others[0]}{more} was {was} when the checkpoint was saved and is {is_now} now: a resume restores "
                "changes of requires_grad for BaseFinetuning callbacks only; set it in on_train_start"
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        now = read_flags(pl_module)
        changed = {
            name: flag for name, flag in now.items() if name in self._saved or self._made.get(name, flag) != flag
        }
        if changed:
            checkpoint[KEY] = changed


def read_flags(module: nn.Module) -> dict[str, bool]:
    """`requires_grad` of the parameters, and `track_running_stats` of batch norms, which freezing changes too."""
    norms = {name: part.track_running_stats for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    return {**norms, **{name: parameter.requires_grad for name, parameter in module.named_parameters()}}


def set_flags(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """The inverse of `read_flags`; names that the module does not have are ignored."""
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and name in flags:
            part.track_running_stats = flags[name]
    for name, parameter in module.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])
