"""Private files: one that is there whole or not at all, and those that others have written."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write a file of mode 0600 whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # New, so that nobody has laid a link there.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too leaves no half-written file
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def private_umask() -> Iterator[None]:
    """For libraries that write into the run's directory and processes that they start, never around user code."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(path: Path) -> None:
    """Take the rights of group and others from what libraries wrote, a file or a folder; no link is followed.

    A umask would do it at once, but it holds for the whole process, and so for the user's own files.

    Raises:
        OSError: it is another user's, or the disk is read-only.
    """
    for folder, _, files in os.walk(path):
        for each in (folder, *(os.path.join(folder, name) for name in files)):  # noqa: PTH118 -- there may be many
            with contextlib.suppress(FileNotFoundError):  # its writer may remove it meanwhile
                mode = os.lstat(each).st_mode
                if not stat.S_ISLNK(mode) and mode & 0o077:
                    os.chmod(each, stat.S_IMODE(mode) & 0o700)  # noqa: PTH101 -- as above
