"""Whether a file in a shared folder is this user's own."""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path


def is_own(found: os.stat_result, folder: Path) -> bool:
    """Whether this user made a file.

    Args:
        found: of the file.
        folder: that it lies in. Some disks show other owners than the process has (NFS for root, network shares,
            mapped containers): there, what counts is the owner that a new file of this process gets.
    """
    return found.st_uid == os.geteuid() or found.st_uid == uid_of_new_files(folder)


def uid_of_new_files(folder: Path) -> int:
    """The owner that a new file in the folder gets; this process's own where none can be made."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_uid
    return os.geteuid()


def name_of_owner(found: os.stat_result) -> str:
    """The user's name, or number where it has none."""
    try:
        return pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return f"user {found.st_uid}"
