"""Checks whether a run's directory can be trusted if several users share the folder of the runs.

A user who can write to it decides what is loaded, resumed and overwritten. Therefore this user must own a run's
directory, no other user may write to it, and no file that the launcher writes may be a link.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from launcher.core.errors import RunDirectoryError
from slurm.ownership import describe_owner, is_own

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Files that the launcher writes; links are not followed, not even this user's.
_FILES = ("events.jsonl", "config.yaml", "plan.json", "out_of_memory.json", "wandb/run_id")
# Folders that may be links to another disk if this user owns them.
_FOLDERS = ("logs", "checkpoints", "wandb", "submissions")


def check_run_folder(path: Path) -> None:
    """Reject a run's directory that another user may have prepared. Accepts one that does not exist.

    Raises:
        RunDirectoryError: with the problem and what to do.
        OSError: it cannot be read.
    """
    problem = find_run_folder_problem(path)
    if problem is not None:
        raise RunDirectoryError(f"{problem}; or choose another --name or runs_dir")


def find_run_folder_problem(path: Path) -> str | None:
    """Why a run's directory is not trusted; None if it is, or if it does not exist.

    Raises:
        OSError: it cannot be read.
    """
    problem = _folder_problem(path)
    if problem is not None or not path.is_dir():
        return problem
    for name in _FILES:
        if (path / name).is_symlink():
            return f"{path / name} is a link, and the launcher does not write through links: remove it"
    return next(filter(None, (_folder_problem(path / name) for name in _FOLDERS)), None)


def _folder_problem(path: Path) -> str | None:
    try:
        link, found = path.lstat(), path.stat()
    except FileNotFoundError:
        return f"{path} is a link to a file that does not exist: remove it" if path.is_symlink() else None
    except NotADirectoryError:
        return None  # reported when the directory is created
    owned = [("belongs to", found)]
    if stat.S_ISLNK(link.st_mode):
        owned.insert(0, ("is a link of", link))
    for what, each in owned:
        if not is_own(each, path.parent) and not _is_the_folders_owner(each, path.parent):
            return f"{path} {what} {describe_owner(each)}, who could change this run: have it removed"
    wide = found.st_mode & _OTHERS_WRITE if stat.S_ISDIR(found.st_mode) else 0
    # Creating a folder to look at its mode takes a disk 1 ms, so only if there is a doubt.
    if wide and wide & ~_mode_of_new_folder(path.parent):
        mode = stat.S_IMODE(found.st_mode)
        return f"{path} can be written by other users (mode {mode:o}): check its content, then run chmod go-w {path}"
    return None


def _is_the_folders_owner(found: os.stat_result, folder: Path) -> bool:
    """Root in a container may use the runs of the user whose folder is mounted."""
    return os.geteuid() == 0 and found.st_uid == folder.stat().st_uid


def _mode_of_new_folder(folder: Path) -> int:
    """The mode of a new private folder on this disk: some disks have no modes, and report the same for all."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as probe:
            return Path(probe).stat().st_mode
    except OSError:
        return 0
