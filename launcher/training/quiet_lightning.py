"""Messages of Lightning during a run: those that repeat the launcher's output are hidden, others are short notices."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from launcher.core.wrapping import escape_controls

# The Trainer's own modules, not callbacks, the tuner and profilers, which the user has configured.
_PARTS = ("trainer", "loops", "strategies", "overrides")
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
# Shorter texts for Lightning's usual advice, with groups of the pattern; they name the launcher's settings.
_ADVICE = (
    (r"It is recommended to use `self\.log\(.*sync_dist=True\)`",
     "epoch metrics without sync_dist are those of rank 0: self.log(..., sync_dist=True) logs the mean of all ranks"),
    (r"The number of training batches \((\d+)\) is smaller than the logging interval .*log_every_n_steps=(\d+)",
     r"an epoch has \1 training batches, fewer than trainer.log_every_n_steps \2: lower it to see more metrics"),
    (r"The '?(\w+)'? does not have many workers", r"\1 has few workers and may be slow: increase num_workers"),
    (r"You passed in a `val_dataloader` but have no `validation_step`",
     "val_dataloader is not used: the model has no validation_step"),
    (r"You defined a `validation_step` but have no `val_dataloader`",
     "validation_step is not called: there is no val_dataloader"),
    (r"Couldn't infer the batch indices", "batch_indices is empty: the loader draws no indices of samples"),
)  # fmt: skip
# Characters of other advice.
_LONGEST = 200
_DETAILS = re.compile(r"`[^`]*`|'[^']*'|\d+")


class LightningAdvice:
    """Shows Lightning's own warnings as notices: each kind once, short and without the path of Lightning's code."""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._seen: set[str] = set()
        # Both packages of Lightning; the user's own code may call its `rank_zero_warn`, with the user's path.
        self._folder = f"{Path(pl.__file__).parent.parent}/"
        self._shown_before = warnings.showwarning

    def show(self, message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        """Replaces `warnings.showwarning`."""
        if not filename.startswith(self._folder):
            self._shown_before(message, category, filename, lineno, file, line)
            return
        kind, text = shorten_advice(str(message))
        if kind not in self._seen:
            self._seen.add(kind)
            self._notice(text)


def shorten_advice(text: str) -> tuple[str, str]:
    """The kind of a warning of Lightning, and the text of its notice: the launcher's own, or its first sentences."""
    line = escape_controls(" ".join(text.split()))
    for pattern, short in _ADVICE:
        found = re.match(pattern, line)
        if found is not None:
            return pattern, found.expand(short)
    if len(line) > _LONGEST:
        sentences = line[: _LONGEST - 1].rpartition(". ")[0]
        line = f"{sentences}." if sentences else line[: _LONGEST - 1] + "\u2026"
    return _DETAILS.sub("", line), f"Lightning: {line}"


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
def quiet_lightning(*more: str, notice: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hide Lightning's messages and warnings, give its advice as notices, and restore all settings afterwards.

    Without `notice`, as on ranks that print none, its advice goes to the rank's log as it is.
    """
    hidden = _TrainerMessageFilter()
    names = ("utilities.rank_zero", "strategies.deepspeed")
    loggers = [logging.getLogger(f"lightning.pytorch.{name}") for name in names]
    before: list[Any] = list(warnings.filters)
    for message in (*_WARNINGS, *more):
        warnings.filterwarnings("ignore", message=message)
    added: list[Any] = [each for each in warnings.filters if each not in before]
    for logger in loggers:
        logger.addFilter(hidden)
    shown_before, show = warnings.showwarning, None if notice is None else LightningAdvice(notice).show
    if show is not None:
        warnings.showwarning = show
    try:
        yield
    finally:
        # A replacement that the user's code has set stays.
        if warnings.showwarning == show:
            warnings.showwarning = shown_before
        for logger in loggers:
            logger.removeFilter(hidden)
        # Not `catch_warnings`: filters that the user's code has added stay.
        kept: Any = warnings.filters
        for each in added:
            if each in kept:
                kept.remove(each)
