"""What is done at the end of a batch, after everybody's `on_train_batch_end`: also the module's, which comes last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override


def after_batch(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Run `action` once at the end of this batch, before a validation that follows it.

    A checkpoint that is saved in a callback's `on_train_batch_end` lacks what later callbacks and the module do in
    theirs, and a resume does not do it again. In `action` Lightning's counters are as they are in a callback, so a
    checkpoint is taken, and resumed from, as one of the end of a batch. Of several actions the last one runs first.

    Args:
        trainer: in one of its callbacks' `on_train_batch_end`.
        action: what it raises ends the training.
    """
    loop = trainer.fit_loop.epoch_loop
    goes_on = loop.on_advance_end

    def once(data_fetcher: Any) -> None:
        if original is None:
            del vars(loop)["on_advance_end"]
        else:
            vars(loop)["on_advance_end"] = original
        with _batch_not_completed(loop.batch_progress):
            action()
        goes_on(data_fetcher)

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


class CheckpointAfterBatch(ModelCheckpoint):
    """Lightning's, which saves every n steps only after all of the batch's hooks."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        save = super().on_train_batch_end
        after_batch(trainer, lambda: save(trainer, pl_module, outputs, batch, batch_idx))
