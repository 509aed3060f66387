"""Saves and restores the learning rate and batch size that Lightning's finders have found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from typing_extensions import override

KEY = "launcher_tuned_values"
_SEARCHES = (LearningRateFinder.on_fit_start, BatchSizeFinder.on_fit_start)


class TunedValues(pl.Callback):
    """Saves the values that the finders set, and sets them in a resumed run instead of searching again.

    A search in a resumed run would use other weights, and Lightning would then start at step 0, as a finder ends by
    restoring its own checkpoint. `kept` has the user's callbacks; in a resumed run without the finders.
    """

    def __init__(self, callbacks: Sequence[pl.Callback], *, resumes: bool, notice: Callable[[str], None]) -> None:
        finders = [callback for callback in callbacks if type(callback).on_fit_start in _SEARCHES]
        self.kept = [callback for callback in callbacks if not resumes or callback not in finders]
        self._finders = finders
        self._resumes = resumes
        if resumes and finders:
            names = " and ".join(type(finder).__name__ for finder in finders)
            notice(f"{names} does not search again: the run continues with its learning rate and batch size")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        names = {name for finder in self._finders for name in _attributes(finder)}
        checkpoint[KEY] = {name: value for name in sorted(names) if lightning_hasattr(pl_module, name)
                           and isinstance(value := lightning_getattr(pl_module, name), (int, float))}  # fmt: skip

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Only once: a finder ends by restoring a checkpoint from before its search.
        found, self._resumes = checkpoint.get(KEY, {}) if self._resumes else {}, False
        for name, value in found.items():
            if lightning_hasattr(pl_module, name):
                lightning_setattr(pl_module, name, value)


def _attributes(finder: pl.Callback) -> tuple[str, ...]:
    if isinstance(finder, BatchSizeFinder):
        return (finder._batch_arg_name,)
    given: str = getattr(finder, "_attr_name", "")
    return (given,) if given else ("lr", "learning_rate")
