"""The state that survivors of a failure have saved for the next attempt of the same launch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from launcher.checkpoint.manifest import find_problem, read_step, remove_checkpoint

# In the run directory: for several nodes, and where shared memory is too small.
KEPT_STATES = "kept"
_NAME = re.compile(r"kept-step-(\d+)\.ckpt")


def record_path(folder: Path, rank: int) -> Path:
    """The record of a rank."""
    return folder / f"rank-{rank}.record"


def state_path(folder: Path, batches: int) -> Path:
    """The complete state after a number of batches."""
    return folder / f"kept-step-{batches}.ckpt"


def claim_path(folder: Path, batches: int) -> Path:
    """Created by the survivor that saves this state."""
    return folder / f"kept-step-{batches}.claim"


def is_kept_state(checkpoint: Path) -> bool:
    """Whether survivors of a failure have saved it."""
    return _NAME.fullmatch(checkpoint.name) is not None


def find_kept_step(folders: Iterable[Path | None]) -> int | None:
    """Optimizer steps of the latest saved state, without a check of its hashes; None without one."""
    steps = [read_step(path) for path in _paths(folders)]
    return max((step for step in steps if step is not None), default=None)


def _paths(folders: Iterable[Path | None]) -> list[Path]:
    return [path for folder in folders if folder is not None for path in folder.glob("kept-step-*.ckpt")]


def find_kept_state(folders: Iterable[Path | None]) -> tuple[Path | None, tuple[str, ...]]:
    """The latest valid state that survivors have saved, and notices about later ones that are damaged."""
    found = sorted(
        ((int(match[1]), path) for path in _paths(folders) if (match := _NAME.fullmatch(path.name))), reverse=True
    )
    notices: list[str] = []
    for _, path in found:
        problem = find_problem(path)
        if problem is None and read_step(path) is not None:
            return path, tuple(notices)
        notices.append(f"the state that a survivor kept, {path}, is skipped: {problem or 'it has no manifest'}")
    return None, tuple(notices)


def remove_kept_states(folder: Path) -> None:
    """Remove all saved states; the records stay. One that cannot be removed is left."""
    for path in folder.glob("kept-step-*"):
        with contextlib.suppress(OSError):
            if path.suffix == ".ckpt":
                remove_checkpoint(path)
            elif path.suffix == ".claim":
                path.unlink(missing_ok=True)
