"""Why a training ended without an error, for the `finished` event."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer

from launcher.core.wrapping import escape_controls


@dataclass(frozen=True, slots=True)
class EndReason:
    """The `reason` of a `finished` event, and a sentence about it if the word alone is not enough."""

    name: str | None
    message: str | None = None


def find_end_reason(trainer: pl.Trainer, *, trained_batches: int, resumed: bool) -> EndReason:
    """The limit that ended a training, in the order in which Lightning checks them."""
    if resumed and not trained_batches:
        return EndReason("nothing_to_train", describe_nothing_to_train(trainer))
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return EndReason("max_steps")
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
        return EndReason("max_epochs")
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
    sentences = [each.stopping_reason_message for each in callbacks if isinstance(each, EarlyStopping)]
    if trainer.should_stop and any(sentences):
        return EndReason("early_stopping", escape_controls(next(filter(None, sentences))))
    timers = [each.time_remaining() for each in callbacks if isinstance(each, Timer)]
    if any(left is not None and left <= 0 for left in timers):
        return EndReason("max_time")
    return EndReason("should_stop" if trainer.should_stop else None)


def describe_nothing_to_train(trainer: pl.Trainer) -> str:
    """Which limit a resumed run has reached already, and what to do."""
    begin = f"nothing was left to train after step {trainer.global_step}"
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return f"{begin}: trainer.max_steps is {trainer.max_steps}; raise it to train on"
    # `lowered_max_epochs` is what the user has set, if it is less than the epochs that are done.
    epochs = getattr(trainer.fit_loop, "lowered_max_epochs", None) or trainer.max_epochs
    if epochs in (None, -1) or trainer.current_epoch < epochs:
        return f"{begin}: raise trainer.max_epochs or trainer.max_steps to train on"
    done = f"{trainer.current_epoch} epoch{'' if trainer.current_epoch == 1 else 's'}"
    return f"{begin}: the run has {done} already, and trainer.max_epochs is {epochs}; raise it to train on"
