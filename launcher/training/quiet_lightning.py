"""Hides messages of Lightning that repeat the launcher's output during a run."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

# The Trainer's own modules, not callbacks, the tuner and profilers, which the user has configured.
_PARTS = ("trainer", "loops", "strategies", "overrides")
# Lightning's advice to use more loader workers is not hidden, because it is about the user's data.
_WARNINGS = (
    ".*Checkpoint directory .* exists and is not empty.*",
    # The launcher's agent starts the ranks, on SLURM too.
    ".*`srun` command is available.*",
    # torchdata and Lightning with torch 2.13.
    ".*set_vital.*",
    # The summary counts parameters; the plan shows their size in half precision.
    ".*is not supported by the model summary.*",
    ".*LeafSpec.*",
    # `launcher convert` makes one file of it.
    ".*When saving the DeepSpeed Stage 3 checkpoint.*",
    # DeepSpeed with torch 2.13.
    ".*(all_gather_into|reduce_scatter)_tensor` is deprecated.*",
)
# An evaluation uses the run's directory and its own callbacks, and continues no training.
EVALUATION_WARNINGS = (
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*The dirpath has changed from .*",
)


class _TrainerMessageFilter(logging.Filter):
    """Hides messages of the Trainer's own code; `rank_zero_info` of the user's code uses the same logger."""

    def __init__(self) -> None:
        super().__init__()
        folder = Path(pl.__file__).parent
        self._folders = tuple(f"{folder / part}/" for part in _PARTS)

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or not record.pathname.startswith(self._folders)


@contextlib.contextmanager
def quiet_lightning(*more: str) -> Iterator[None]:
    """Hide Lightning's messages and warnings, and restore all settings afterwards."""
    hidden = _TrainerMessageFilter()
    names = ("utilities.rank_zero", "strategies.deepspeed")
    loggers = [logging.getLogger(f"lightning.pytorch.{name}") for name in names]
    before: list[Any] = list(warnings.filters)
    for message in (*_WARNINGS, *more):
        warnings.filterwarnings("ignore", message=message)
    added: list[Any] = [each for each in warnings.filters if each not in before]
    for logger in loggers:
        logger.addFilter(hidden)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(hidden)
        # Not `catch_warnings`: filters that the user's code has added stay.
        kept: Any = warnings.filters
        for each in added:
            if each in kept:
                kept.remove(each)
