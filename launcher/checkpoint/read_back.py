"""Check at the first checkpoint that a run can resume from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.checkpoint.formats import format_of
from launcher.checkpoint.reader import Trust, foreign_objects, list_objects, read_file
from launcher.core.errors import ResumeError, first_line


class ReadBack:
    """Reads the first checkpoint in each folder as a resume does, and gives a notice if that fails."""

    def __init__(self, trust: Trust, notice: Callable[[str], None]) -> None:
        self._trust = trust
        self._notice = notice
        self._done: set[Path] = set()

    def __call__(self, written: Path, name: Path) -> None:
        """Check a checkpoint by its temporary file or DeepSpeed's folder, and the path that it will have."""
        if name.parent in self._done:
            return
        self._done.add(name.parent)
        try:
            for file in format_of(written).sample_files(written):
                self._check(file, name)
        except Exception as error:  # noqa: BLE001 -- the training continues in any case, as in plain Lightning
            reason = first_line(error.__cause__ if isinstance(error, ResumeError) and error.__cause__ else error)
            self._notice(f"the checkpoint {name} cannot be read back: {reason}; no resume or restart can use it")

    def _check(self, file: Path, name: Path) -> None:
        foreign = foreign_objects(file)
        if not foreign:
            return
        objection = self._trust.objection(name, is_written=False)
        if objection is None:
            read_file(file, Trust(everywhere=True))
            return
        self._notice(
            f"the checkpoint {name} contains objects whose loading runs code: {list_objects(foreign)}; a resume "
            f"from it needs --resume-trust, as {objection}"
        )
