"""Provides a folder for Unix sockets if TMPDIR is too long: a socket address holds 107 bytes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

_ADDRESS_BYTES = 107
# Bytes that `multiprocessing` appends: /pymp-xxxxxxxx/listener-xxxxxxxx.
_APPENDED_BYTES = 33
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 -- a private folder is created there


@contextlib.contextmanager
def socket_folder() -> Iterator[None]:
    """In the block, `multiprocessing` and loader workers create their sockets in a private folder with a short name.

    Does nothing if TMPDIR is short enough, or if this process's parent did it.
    """
    # `multiprocessing` keeps its folder in this entry, and passes it on to the processes that it starts.
    config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    if "tempdir" in config or len(os.fsencode(tempfile.gettempdir())) + _APPENDED_BYTES <= _ADDRESS_BYTES:
        yield
        return
    folder = _make_folder()
    if folder is not None:
        config["tempdir"] = folder
    try:
        yield
    finally:
        if folder is not None:
            config.pop("tempdir", None)
            shutil.rmtree(folder, ignore_errors=True)


def socket_folder_in_use() -> str | None:
    """Where this process creates sockets; None for TMPDIR."""
    found: str | None = vars(multiprocessing.current_process())["_config"].get("tempdir")
    return found


def _make_folder() -> str | None:
    for place in _SHORT:
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp(prefix="launcher-", dir=place)
    return None
