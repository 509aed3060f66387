"""Leaves out what Lightning says of things that the launcher's own output says already, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

# The Trainer's own parts; what callbacks, the tuner and profilers say is asked for by the user.
_PARTS = ("trainer", "loops", "strategies", "overrides")
# Lightning's advice to use more loader workers is for the user's data, and shown once is enough: it stays.
_WARNINGS = (
    ".*Checkpoint directory .* exists and is not empty.*",
    # The ranks are made by the launcher's agent, on SLURM too.
    ".*`srun` command is available.*",
    # torchdata's and Lightning's own affair with torch 2.13.
    ".*set_vital.*",
    # The summary counts parameters; their size in half precision is the plan's to say.
    ".*is not supported by the model summary.*",
    ".*LeafSpec.*",
    # DeepSpeed's own affair with torch 2.13.
    ".*(all_gather_into|reduce_scatter)_tensor` is deprecated.*",
)


class _WithoutTrainers(logging.Filter):
    """Hides what the Trainer's own code says; `rank_zero_info` of the user's code has the same logger."""

    def __init__(self) -> None:
        super().__init__()
        folder = Path(pl.__file__).parent
        self._folders = tuple(f"{folder / part}/" for part in _PARTS)

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or not record.pathname.startswith(self._folders)


@contextlib.contextmanager
def quiet_lightning(*more: str) -> Iterator[None]:
    """Hide Lightning's own lines and warnings; afterwards everything is as it was.

    Args:
        more: patterns of further warnings.
    """
    hidden = _WithoutTrainers()
    loggers = [
        logging.getLogger(f"lightning.pytorch.{name}") for name in ("utilities.rank_zero", "strategies.deepspeed")
    ]
    before: list[Any] = list(warnings.filters)
    for message in (*_WARNINGS, *more):
        warnings.filterwarnings("ignore", message=message)
    ours: list[Any] = [each for each in warnings.filters if each not in before]
    for logger in loggers:
        logger.addFilter(hidden)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(hidden)
        # Not `catch_warnings`: filters that the user's code has added meanwhile stay.
        kept: Any = warnings.filters
        for each in ours:
            if each in kept:
                kept.remove(each)
