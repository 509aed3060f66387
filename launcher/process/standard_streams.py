"""Handles standard streams that are missing, or that user code has replaced."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO, cast


def open_missing_streams() -> None:
    """Open /dev/null for each of descriptors 0 to 2 that is closed, and for each standard stream that is None.

    Otherwise the next file or socket gets that number, and printed text is written to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # `open` returns the lowest free number, which is this one. Children inherit it, as any standard stream.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 -- as long as the process


def is_plain(stream: TextIO, descriptor: int) -> bool:
    """Whether a stream is Python's own text file on this descriptor, and not a user's object."""
    return type(stream) is io.TextIOWrapper and _descriptor_of(stream) == descriptor


def writes_to_standard_stream(stream: object) -> bool:
    """Whether a user's object holds a file on descriptor 1 or 2, as a Tee of `sys.__stdout__` does."""
    held = cast("dict[str, Any]", getattr(stream, "__dict__", {})).values()
    nested = [each for value in held for each in (value if isinstance(value, list | tuple) else [value])]
    return any(_descriptor_of(each) in (1, 2) for each in (stream, *nested))


def _descriptor_of(stream: object) -> int | None:
    """A file's descriptor; None if the object is no file."""
    try:
        return cast(TextIO, stream).fileno()
    except Exception:  # noqa: BLE001 -- a user's object may raise anything
        return None


class LoggedStream:
    """A user's stream whose text goes to a log as well; all other attributes are those of the stream.

    Args:
        stream: the user's object; it gets the text first, and its exceptions are raised.
        log: takes the text; None if the stream itself passes the text on to the log.
    """

    def __init__(self, stream: TextIO, log: Callable[[str], object] | None) -> None:
        self._stream = stream
        self._log = log

    def write(self, text: str, /) -> Any:
        """Write to both."""
        written = self._stream.write(text)
        if self._log is not None:
            # A full disk must not stop the user's stream.
            with contextlib.suppress(OSError):
                self._log(text)
        return written

    def writelines(self, lines: Iterable[str], /) -> None:
        """Write to both."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the user's stream, if it can: `print` requires only `write`."""
        getattr(self._stream, "flush", bool)()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
