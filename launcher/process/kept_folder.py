"""The folder in shared memory where the ranks of one launch on this node keep what must outlive them.

Its name has the process of the launch, so that a later launch can remove what a killed one has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.process.rank_status import FOLDER_VARIABLE

# Set by the launcher's agent.
KEPT_VARIABLE = "LAUNCHER_KEPT_DIR"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- a private folder is created there
_PREFIX = "launcher-kept-"


def create_kept_folder(owner: int | None = None) -> Path | None:
    """Create the folder of the launch of process `owner`, by default this one, or find it; None if none can be made.

    Folders of launches that have ended are removed first.
    """
    owner = os.getpid() if owner is None else owner
    for place in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            remove_left_folders(place)
            path = place / f"{_PREFIX}{os.geteuid()}-{owner}-{_start_of(owner)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            if _is_private(path):
                return path
    return None


def find_kept_folder(env: Mapping[str, str]) -> Path | None:
    """The folder of this rank's launch; None without an agent that restarts ranks."""
    if FOLDER_VARIABLE in env:
        path = Path(env.get(KEPT_VARIABLE, ""))
        return path if path.is_absolute() and _is_private(path) else None
    return create_kept_folder(os.getppid()) if _restarts(env) != (0, 0) else None


def can_restart(env: Mapping[str, str]) -> bool:
    """Whether torchelastic may restart the ranks once more; the launcher's agent decides that itself."""
    count, limit = _restarts(env)
    return FOLDER_VARIABLE in env or count < limit


def _restarts(env: Mapping[str, str]) -> tuple[int, int]:
    """The number of restarts so far and the most that torchelastic makes; zeros without it."""
    count, limit = env.get("TORCHELASTIC_RESTART_COUNT", ""), env.get("TORCHELASTIC_MAX_RESTARTS", "")
    return (int(count), int(limit)) if count.isdecimal() and limit.isdecimal() else (0, 0)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Protect the folder from `remove_left_folders` of a process that cannot see this launch, as in a container."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_left_folders(place: Path) -> None:
    """Remove the folders of this user's launches that have ended without removing them."""
    for path in place.glob(f"{_PREFIX}{os.geteuid()}-*"):
        owner, _, start = path.name.removeprefix(f"{_PREFIX}{os.geteuid()}-").partition("-")
        if not owner.isdecimal() or _start_of(int(owner)) == start or not _is_private(path):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _is_private(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _start_of(process: int) -> str:
    """When a process started, in ticks since the machine's start; `ended` without such a process."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "ended"
    # The name of the program, in parentheses, may contain anything.
    return text.rpartition(")")[2].split()[19]
