"""The owner of a file in a shared folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path


def is_own(found: os.stat_result, folder: Path) -> bool:
    """Whether this user owns a file in the folder.

    Some disks map owners (NFS for root, network shares, user namespaces): there, the owner of this process's new files
    counts.
    """
    return found.st_uid == os.geteuid() or found.st_uid == find_new_file_owner(folder)


def find_new_file_owner(folder: Path) -> int:
    """The owner of a new file in the folder; this process's user if no file can be created there."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_uid
    return os.geteuid()


def describe_owner(found: os.stat_result) -> str:
    """The owner's name, or number if it has no name."""
    try:
        return pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return f"user {found.st_uid}"
