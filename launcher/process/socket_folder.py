"""A folder for Unix sockets where TMPDIR is too long: their addresses hold 107 bytes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

_ADDRESS_BYTES = 107
# What `multiprocessing` appends: /pymp-xxxxxxxx/listener-xxxxxxxx.
_OWN_BYTES = 33
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 -- a private folder is made there


@contextlib.contextmanager
def socket_folder() -> Iterator[None]:
    """Inside, `multiprocessing` makes its sockets, and loader workers theirs, in a private folder of a short name.

    Nothing is done where TMPDIR is short enough, or where this process's parent has done it.
    """
    # `multiprocessing` keeps its folder there, and hands it on to the processes that it starts.
    config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
    if "tempdir" in config or len(os.fsencode(tempfile.gettempdir())) + _OWN_BYTES <= _ADDRESS_BYTES:
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


def folder_of_sockets() -> str | None:
    """Where this process makes sockets; None for TMPDIR."""
    found: str | None = vars(multiprocessing.current_process())["_config"].get("tempdir")
    return found


def _make_folder() -> str | None:
    for place in _SHORT:
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp(prefix="launcher-", dir=place)
    return None
