"""The command that uploads a run's offline W&B data."""

from __future__ import annotations

import shlex
from pathlib import Path

# Bytes of a data file without a record.
_HEADER = 7


def find_sync_command(folder: Path, shown: Path) -> str | None:
    """The command for all attempts of a run; None if nothing was recorded offline.

    W&B has a directory for each attempt, and adds them to the same run in the order in which they are uploaded. An
    attempt that was killed may have no data, or end with an incomplete record. `wandb sync` with several directories
    uploads nothing after such a one, so each directory has its own call.

    Args:
        folder: the `wandb` folder of the run.
        shown: the same folder as the user types it.
    """
    names = sorted(path.name for path in folder.glob("offline-run-*") if _has_records(path))
    if not names:
        return None
    if len(names) == 1:
        return f"wandb sync {shlex.quote(str(shown / names[0]))}"
    return f'for run in {shlex.quote(str(shown))}/offline-run-*; do wandb sync "$run"; done'


def _has_records(folder: Path) -> bool:
    return any(file.stat().st_size > _HEADER for file in folder.glob("*.wandb"))
