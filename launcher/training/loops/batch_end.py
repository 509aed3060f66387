"""Run an action at the end of a batch, after the `on_train_batch_end` hooks of all callbacks and of the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl


def after_batch(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Run `action` once at the end of this batch, before a validation that follows it.

    Call it in a callback's `on_train_batch_end`. A checkpoint that is saved there lacks the changes that later
    callbacks and the module make in this hook, and a resume does not run the hook again. In `action` Lightning's
    counters have the same values as in a callback, so the checkpoint is resumed as one of the end of a batch. Of
    several actions the last one runs first. An exception in `action` ends the training.
    """
    loop = trainer.fit_loop.epoch_loop
    proceed = loop.on_advance_end

    def once(data_fetcher: Any) -> None:
        if original is None:
            del vars(loop)["on_advance_end"]
        else:
            vars(loop)["on_advance_end"] = original
        with _batch_not_completed(loop.batch_progress):
            action()
        proceed(data_fetcher)

    original = vars(loop).get("on_advance_end")
    vars(loop)["on_advance_end"] = once


@contextmanager
def _batch_not_completed(progress: Any) -> Iterator[None]:
    for count in (progress.total, progress.current):
        count.completed -= 1
    try:
        yield
    finally:
        for count in (progress.total, progress.current):
            count.completed += 1
