"""Notices for a resume in the middle of an epoch: hooks that do not run again, and hooks that run twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from typing_extensions import override

from launcher.training.loops.position import Position

_BEGINNING, _END = "on_train_epoch_start", "on_train_epoch_end"


class PartialEpochNotices(pl.Callback):
    """Describes, before the first step, how the resumed epoch differs from that of an uninterrupted run.

    As in Lightning, `on_train_epoch_start` is not called again, as it would count, unfreeze or draw twice. Values that
    only this hook sets are missing. If the Trainer ended the epoch early, the hooks of its end run twice.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = cast(Any, trainer).callbacks
        saved: Position | None = getattr(trainer.fit_loop, "resumed_from", None)
        if saved is not None and (repeated := _done_twice(saved, pl_module, callbacks)):
            place = "middle" if saved.cut else "end"
            self._notice(f"the run ended in the {place} of epoch {saved.epoch - (saved.batches == 0)}: to end it, "
                         f"Lightning {' and '.join(repeated)}")  # fmt: skip
        epoch = trainer.current_epoch
        pruning = [each for each in callbacks if isinstance(each, ModelPruning)]
        if saved is not None and any(epoch > 0 or not each._prune_on_train_epoch_end for each in pruning):
            self._notice(
                "ModelPruning does not save its masks in a checkpoint: pruned weights are 0 now, and are trained until "
                "it prunes again from the start; an uninterrupted run keeps them at 0 and prunes further"
            )
        if getattr(trainer.fit_loop, "position", None) is None:
            return
        if skipped := find_own_hooks(_BEGINNING, pl_module, callbacks):
            self._notice(
                f"epoch {epoch} is resumed in its middle, so {' and '.join(skipped)} is not called again, as in plain "
                "Lightning; set values that a step needs in __init__ too, or save them: on_save_checkpoint of a "
                "module, state_dict of a callback"
            )
        if any(isinstance(each, StochasticWeightAveraging) and each.swa_start <= epoch for each in callbacks):
            self._notice(
                f"StochasticWeightAveraging sets its learning rate at the start of an epoch: epoch {epoch} is resumed "
                "in its middle, so it does so one epoch later than in an uninterrupted run"
            )


def _done_twice(position: Position, module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[str]:
    found: list[str] = []
    if position.validated_to_stop:
        found.append("validated once more than in an uninterrupted run, which callbacks such as EarlyStopping count")
    if position.cut and (hooks := find_own_hooks(_END, module, callbacks)):
        found.append(f"called {' and '.join(hooks)}, which is called again at the end of the epoch")
    return found


def find_own_hooks(name: str, module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[str]:
    """The hooks of a name that the user overrides, with the names of their classes."""
    owners = [type(each) for each in (module, *callbacks)]
    known = ("lightning", "pytorch_lightning", "launcher")
    return [f"{owner.__qualname__}.{name}" for owner in dict.fromkeys(owners)
            if getattr(owner, name).__module__.partition(".")[0] not in known]  # fmt: skip
