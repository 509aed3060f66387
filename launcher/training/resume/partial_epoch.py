"""What an epoch that a resume goes on with in its middle leaves out, and what it has twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from typing_extensions import override

from launcher.training.loops.position import Position

_BEGINNING, _END = "on_train_epoch_start", "on_train_epoch_end"


class PartialEpochNotices(pl.Callback):
    """Tells before the first step what of the epoch that goes on is not as in an uninterrupted run.

    Its `on_train_epoch_start` is not called. Lightning does not call it either: it would count, unfreeze or draw twice.
    But what it alone sets is missing then. Where the Trainer ended the epoch in its middle, its end was made there.

    Args:
        notice: told of them.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = cast(Any, trainer).callbacks
        saved: Position | None = getattr(trainer.fit_loop, "resumed_from", None)
        if saved is not None and (twice := _had_twice(saved, pl_module, callbacks)):
            place = "middle" if saved.cut else "end"
            self._notice(f"the run was ended in the {place} of epoch {saved.epoch - (saved.batches == 0)}: for that "
                         f"Lightning {' and '.join(twice)}")  # fmt: skip
        epoch = trainer.current_epoch
        pruning = [each for each in callbacks if isinstance(each, ModelPruning)]
        if saved is not None and any(epoch > 0 or not each._prune_on_train_epoch_end for each in pruning):
            self._notice(
                "ModelPruning keeps no masks in a checkpoint: pruned weights are 0 now, and are trained until it "
                "prunes again from the beginning; an uninterrupted run keeps them at 0 and prunes further"
            )
        if getattr(trainer.fit_loop, "position", None) is None:
            return
        if left_out := own_hooks(_BEGINNING, pl_module, callbacks):
            self._notice(
                f"epoch {epoch} goes on in its middle, so that {' and '.join(left_out)} is not called for it again, as "
                "in Lightning; set what a step needs of it in __init__ too, or save it: on_save_checkpoint of a "
                "module, state_dict of a callback"
            )
        if any(isinstance(each, StochasticWeightAveraging) and each.swa_start <= epoch for each in callbacks):
            self._notice(
                f"StochasticWeightAveraging sets its learning rate where an epoch begins: epoch {epoch} goes on in its "
                "middle, so that it does so an epoch later than an uninterrupted run"
            )


def _had_twice(position: Position, module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[str]:
    found: list[str] = []
    if position.validated_to_stop:
        found.append("validated once more than in an uninterrupted run, which callbacks such as EarlyStopping count")
    if position.cut and (hooks := own_hooks(_END, module, callbacks)):
        found.append(f"called {' and '.join(hooks)}, to be called again where the epoch ends")
    return found


def own_hooks(name: str, module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[str]:
    """The user's own hooks of a name, by the names of their classes; Lightning's and ours are known."""
    owners = [type(each) for each in (module, *callbacks)]
    return [f"{owner.__qualname__}.{name}" for owner in dict.fromkeys(owners)
            if not _is_known(getattr(owner, name).__module__)]  # fmt: skip


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in ("lightning", "pytorch_lightning", "launcher")
