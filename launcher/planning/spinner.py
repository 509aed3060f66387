"""A line on the terminal with the current activity, while a plan is made."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO, cast

from launcher.process.activity import current_activity

_FRAMES = "|/-\\"
_INTERVAL = 0.1
# Seconds without other output before the line is drawn: a quick plan shows none.
_QUIET = 0.5
_ERASE = "\r\x1b[2K"


def find_terminal() -> TextIO | None:
    """The terminal for the line: stderr, or stdout where stderr is a pipe to a rank's log; None without a terminal."""
    # A pager on stdout uses the same terminal as stderr.
    if os.environ.get("TERM") in ("dumb", "unknown") or not _is_terminal(sys.stdout):
        return None
    return sys.stderr if _is_terminal(sys.stderr) else sys.stdout


def _is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", bool)())


@contextlib.contextmanager
def show_activity(terminal: TextIO | None) -> Iterator[None]:
    """Show the current activity and its duration on a terminal until the block ends; None shows nothing.

    Other output of this process erases the line first, which is drawn again later.
    """
    if terminal is None:
        yield
        return
    line = _ActivityLine(terminal)
    replaced = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    passing = {name: cast(TextIO, _ErasingStream(stream, line)) for name, stream in replaced.items()}
    for name, stream in passing.items():
        setattr(sys, name, stream)
    thread = threading.Thread(target=line.draw_until_ended, name="launcher-spinner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        line.end()
        thread.join()
        for name, stream in replaced.items():
            # The user's code may have replaced it too.
            if getattr(sys, name) is passing[name]:
                setattr(sys, name, stream)


class _ActivityLine:
    """The line, drawn by a thread."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._is_drawn = False
        # Whether the cursor is at the beginning of a line.
        self._is_at_start = True
        self._last_output = time.monotonic()

    def draw_until_ended(self) -> None:
        """Draw the line in each interval."""
        activity, since = "", time.monotonic()
        for frame in itertools.cycle(_FRAMES):
            if self._ended.wait(_INTERVAL):
                return
            now = time.monotonic()
            if activity != current_activity():
                activity, since = current_activity(), now
            with self._locked():
                if not self._ended.is_set() and self._is_at_start and now - self._last_output >= _QUIET:
                    self._draw(f"{frame} {activity or 'making the plan'} ({now - since:.0f} s)")

    def pass_on(self, stream: TextIO, text: str) -> Any:
        """Write other output, not over the line."""
        with self._locked():
            self._erase()
            if text:
                self._is_at_start = text.endswith("\n")
                self._last_output = time.monotonic()
            return stream.write(text)

    def end(self) -> None:
        """Erase the line for the last time."""
        self._ended.set()
        with self._locked():
            self._erase()

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write(f"{_ERASE}{text[:width]}")
        self._is_drawn = True

    def _erase(self) -> None:
        if self._is_drawn:
            self._write(_ERASE)
            self._is_drawn = False

    def _write(self, text: str) -> None:
        # A closed terminal ends no plan.
        with contextlib.suppress(OSError, ValueError):
            self._terminal.write(text)
            self._terminal.flush()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A process that the user's code forks may get a lock that no thread of it will release.
        is_locked = self._lock.acquire(timeout=1)
        try:
            yield
        finally:
            if is_locked:
                self._lock.release()


class _ErasingStream:
    """A standard stream that erases the line before it writes; all other attributes are those of the stream."""

    def __init__(self, stream: TextIO, line: _ActivityLine) -> None:
        self._stream = stream
        self._line = line

    def write(self, text: str, /) -> Any:
        """Write to the stream."""
        return self._line.pass_on(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
