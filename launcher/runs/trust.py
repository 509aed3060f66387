"""Whether a run's directory can be trusted where several users share the folder of the runs.

Whoever can write there decides what is loaded, resumed and overwritten. So a run's directory is this user's own, nobody
else can write to it, and nothing that is written in it is a link to somewhere else.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from launcher.core.errors import RunDirectoryError
from slurm.ownership import is_own, name_of_owner

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Files of the launcher's own; a user's link is followed nowhere, so that nobody's is.
_FILES = ("events.jsonl", "config.yaml", "plan.json", "out_of_memory.json", "wandb/run_id")
# These may be links to another disk, if they are this user's own.
_FOLDERS = ("logs", "checkpoints", "wandb", "submissions")


def check_run_folder(path: Path) -> None:
    """Refuse a run's directory that somebody else may have prepared; one that does not exist is fine.

    Raises:
        RunDirectoryError: says what was found and what to do.
        OSError: it cannot be looked at.
    """
    problem = run_folder_problem(path)
    if problem is not None:
        raise RunDirectoryError(f"{problem}; or choose another --name or runs_dir")


def run_folder_problem(path: Path) -> str | None:
    """Why a run's directory is not trusted; None if it is, or if there is none.

    Raises:
        OSError: it cannot be looked at.
    """
    problem = _folder_problem(path)
    if problem is not None or not path.is_dir():
        return problem
    for name in _FILES:
        if (path / name).is_symlink():
            return f"{path / name} is a link, and the launcher writes through none: remove it"
    return next(filter(None, (_folder_problem(path / name) for name in _FOLDERS)), None)


def _folder_problem(path: Path) -> str | None:
    try:
        link, found = path.lstat(), path.stat()
    except FileNotFoundError:
        return f"{path} is a link to nowhere: remove it" if path.is_symlink() else None
    except NotADirectoryError:
        return None  # told when the directory is made
    looked_at = [("belongs to", found)]
    if stat.S_ISLNK(link.st_mode):
        looked_at.insert(0, ("is a link of", link))
    for what, each in looked_at:
        if not is_own(each, path.parent) and not _is_the_folders_owner(each, path.parent):
            return f"{path} {what} {name_of_owner(each)}, who could change what this run does: have it removed"
    if found.st_mode & _OTHERS_WRITE & ~_shown_for_private(path.parent) and stat.S_ISDIR(found.st_mode):
        mode = stat.S_IMODE(found.st_mode)
        return f"{path} can be written by other users (mode {mode:o}): look at what is in it, then chmod go-w {path}"
    return None


def _is_the_folders_owner(found: os.stat_result, folder: Path) -> bool:
    """Root in a container goes on with the runs of the user whose folder it was given."""
    return os.geteuid() == 0 and found.st_uid == folder.stat().st_uid


def _shown_for_private(folder: Path) -> int:
    """The mode that a new private folder has here: some disks know no modes, and show the same for all."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as probe:
            return Path(probe).stat().st_mode
    except OSError:
        return 0
