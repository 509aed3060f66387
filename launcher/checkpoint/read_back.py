"""Whether a run can go on from what it saves: found at the first checkpoint, while something can be done about it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.checkpoint.formats import format_of
from launcher.checkpoint.reader import Trust, foreign_objects, listed, plain, read_file
from launcher.core.errors import ResumeError


class ReadBack:
    """Reads the first checkpoint in each folder as a resume would.

    Args:
        trust: which checkpoints may run code when they are loaded.
        notice: told of what a resume could not read.
    """

    def __init__(self, trust: Trust, notice: Callable[[str], None]) -> None:
        self._trust = trust
        self._notice = notice
        self._done: set[Path] = set()

    def __call__(self, written: Path, name: Path) -> None:
        """Look at a checkpoint.

        Args:
            written: where it is: its file, or DeepSpeed's folder.
            name: the path that it will have.
        """
        if name.parent in self._done:
            return
        self._done.add(name.parent)
        try:
            for file in format_of(written).sample_files(written):
                self._look(file, name)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the training goes on, as plain Lightning's does
            reason = plain(error.__cause__ if isinstance(error, ResumeError) and error.__cause__ else error)
            self._notice(f"the checkpoint {name} cannot be read back: {reason}; no resume or restart can go on from it")

    def _look(self, file: Path, name: Path) -> None:
        foreign = foreign_objects(file)
        if not foreign:
            return
        objection = self._trust.objection(name, is_written=False)
        if objection is None:
            read_file(file, Trust(everywhere=True))
            return
        self._notice(
            f"the checkpoint {name} holds objects whose loading runs code: {listed(foreign)}; a resume from it needs "
            f"--resume-trust, as {objection}"
        )


def unsaveable(value: Any, key: str = "") -> str | None:
    """The first part of a checkpoint that cannot be pickled, as a lambda: its key and class; None if there is none."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping | list | tuple):
        parts: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        found = (unsaveable(part, f"{key}.{name}" if key else str(name)) for name, part in parts)
        return next((text for text in found if text is not None), None)
    try:
        pickle.dumps(value, protocol=2)
    except Exception:  # noqa: BLE001 -- whatever its class raises
        return f"{key} ({type(value).__module__}.{type(value).__qualname__})"
    return None
