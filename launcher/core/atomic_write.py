"""Private files, written atomically: a reader sees the old content or the new content, never a part of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file of mode 0600, which replaces `path` when the block ends without an error.

    `durable` waits until the content is on the disk; files that are useless after a reboot do not need it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # O_EXCL: in a shared folder, another user may have created a link with this name.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too leaves no partial file
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file of mode 0600 atomically; see `replace_file`."""
    with replace_file(path, durable=durable) as file:
        file.write(text.encode())


@contextmanager
def private_umask() -> Iterator[None]:
    """Make files of libraries and of the processes that they start private; not to be used around user code."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(path: Path) -> None:
    """Remove the permissions of group and others from a file or a folder that a library wrote; follows no link.

    A umask would apply to the user's own files too.

    Raises:
        OSError: another user owns it, or the disk is read-only.
    """
    for folder, _, files in os.walk(path):
        for each in (folder, *(os.path.join(folder, name) for name in files)):  # noqa: PTH118 -- there may be many
            with contextlib.suppress(FileNotFoundError):  # its writer may remove it meanwhile
                mode = os.lstat(each).st_mode
                if not stat.S_ISLNK(mode) and mode & 0o077:
                    os.chmod(each, stat.S_IMODE(mode) & 0o700)  # noqa: PTH101 -- as above
