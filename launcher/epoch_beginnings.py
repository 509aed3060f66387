"""What an epoch that a resume goes on with in its middle leaves out: the hooks of its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from typing_extensions import override

_HOOK = "on_train_epoch_start"


class TellBeginnings(pl.Callback):
    """Tells before the first step whose `on_train_epoch_start` is not called for the epoch that goes on.

    Lightning does not call it either: it would count, unfreeze or draw twice. But what it alone sets is missing then.

    Args:
        notice: told of them.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if getattr(trainer.fit_loop, "position", None) is None:
            return
        epoch = trainer.current_epoch
        callbacks: list[pl.Callback] = cast(Any, trainer).callbacks
        if left_out := hooks_left_out(pl_module, callbacks):
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


def hooks_left_out(module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> list[str]:
    """The user's own hooks of an epoch's beginning, by the names of their classes; Lightning's and ours are known."""
    owners = [type(each) for each in (module, *callbacks)]
    return [f"{owner.__qualname__}.{_HOOK}" for owner in dict.fromkeys(owners)
            if not _is_known(getattr(owner, _HOOK).__module__)]  # fmt: skip


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in ("lightning", "pytorch_lightning", "launcher")
