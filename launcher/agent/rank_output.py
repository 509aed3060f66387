"""Copies the output of the ranks of this node to their log files and to the terminal, each stream to its own.

A rank sees what it would see without the launcher: a terminal where the agent has one, a pipe where it has a pipe.
Lines of different ranks are never mixed: rank 0 is shown as it writes, the other ranks line by line with a prefix. A
full disk or a closed terminal loses output, but never stops a rank.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import selectors
import signal
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.process.rank_log import name_earlier_log
from launcher.process.rank_streams import STDIN, STREAMS, count_unread, stream_path

_CHUNK = 65536
# Other ranks may go on writing.
_DRAIN_TIMEOUT = 0.5
# Seconds that rank 0 has to end its line before another rank's line is shown: `print` writes each value by itself.
_HOLD = 0.1
# Seconds between two checks of the terminal's size.
_RESIZE_INTERVAL = 1.0
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
# Cursor movements of a display with several lines, as rich draws them.
_MOVEMENT = re.compile(rb"\x1b\[\d*[A-HJ]|\x1b\[\?25[hl]")
_ERASE = re.compile(rb"\x1b\[\d*K")


@dataclass(slots=True)
class _Stream:
    """One stream of one rank; `terminal` is the agent's descriptor for it, None if it is not shown."""

    rank: int
    reader: int
    log: int | None
    terminal: int | None
    kept_open: int | None = None
    pending: bytes = field(default=b"")


class RankOutput:
    """The output of all ranks of this node, over all attempts.

    Args:
        logs: folder of the log files; None for no files.
        is_shown: whether the output of a rank is shown, by its global and its local rank.
    """

    def __init__(self, logs: Path | None, is_shown: Callable[[int, int], bool]) -> None:
        self._logs = logs
        self._is_shown = is_shown
        self._streams: list[_Stream] = []
        self._thread: threading.Thread | None = None
        self._reading = threading.Lock()
        self._wake: tuple[int, int] | None = None
        self._has_terminal = False
        # Whether the last byte on each terminal or file ended a line; by what the descriptor is open on.
        self._at_line_start: dict[tuple[int, int], bool] = {}
        # Lines of other ranks that wait for the end of rank 0's line, until a time; and where they have ended its line.
        self._held: dict[tuple[int, int], tuple[int, bytes, float]] = {}
        self._interrupted: set[tuple[int, int]] = set()

    def start_attempt(self, folder: Path, ranks: Iterable[int]) -> None:
        """Make the streams of these global ranks in the attempt's folder, local rank 0 first, and start to copy."""
        self.end_attempt()
        (folder / STDIN).symlink_to(f"/proc/{os.getpid()}/fd/0")
        for local, rank in enumerate(ranks):
            log = self._open_log(rank)
            is_shown = self._is_shown(rank, local)
            for descriptor in STREAMS:
                path = stream_path(folder, rank, descriptor)
                terminal = descriptor if is_shown else None
                own_log = None if log is None else os.dup(log)
                if is_shown and os.isatty(descriptor):
                    reader, slave = _make_terminal(path, descriptor)
                    self._streams.append(_Stream(rank, reader, own_log, terminal, slave))
                else:
                    self._streams.append(_Stream(rank, _make_pipe(path), own_log, terminal))
            if log is not None:
                os.close(log)
        with contextlib.suppress(OSError):  # stdin is no terminal
            self._has_terminal = os.tcgetpgrp(0) == os.getpgrp()
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._copy, name="launcher-output", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Wait until everything that the ranks have written so far is copied, incomplete lines too."""
        give_up = time.monotonic() + _DRAIN_TIMEOUT
        while any(_has_data(stream.reader) for stream in self._streams) and time.monotonic() < give_up:
            time.sleep(0.002)
        with self._reading:
            for stream in self._streams:
                if stream.pending:
                    self._write(stream, b"\n", show=stream.rank != 0)
            self._show_held(float("inf"))

    def end_attempt(self) -> None:
        """Copy the rest and close the streams; a process that a rank has left behind gets an error when it writes."""
        if self._thread is None or self._wake is None:
            return
        self.drain()
        os.write(self._wake[1], b"\0")
        self._thread.join()
        for stream in self._streams:
            for descriptor in (stream.reader, stream.log, stream.kept_open):
                if descriptor is not None:
                    os.close(descriptor)
        for descriptor in self._wake:
            os.close(descriptor)
        self._streams, self._thread, self._wake = [], None, None
        if self._has_terminal:
            _take_terminal_back()

    def _open_log(self, rank: int) -> int | None:
        if self._logs is None:
            return None
        path = self._logs / f"rank-{rank}.log"
        # On a full disk the ranks run without a log.
        with contextlib.suppress(OSError):
            if path.exists():
                path.rename(name_earlier_log(path))
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        return None

    def _copy(self) -> None:
        assert self._wake is not None  # noqa: S101 -- start_attempt has just set it
        with selectors.DefaultSelector() as selector:
            for stream in self._streams:
                selector.register(stream.reader, selectors.EVENT_READ, stream)
            selector.register(self._wake[0], selectors.EVENT_READ)
            while True:
                with self._reading:
                    ready = selector.select(0)
                    for key, _ in ready:
                        if key.data is None:
                            return
                        with contextlib.suppress(OSError):
                            self._write(key.data, os.read(key.fd, _CHUNK))
                    self._show_held(time.monotonic())
                if not ready and not selector.select(_HOLD if self._held else _RESIZE_INTERVAL):
                    self._resize()

    def _write(self, stream: _Stream, data: bytes, *, show: bool = True) -> None:
        *lines, rest = (stream.pending + data).split(b"\n")
        # A progress bar draws itself again after a carriage return: only its last state is kept.
        stream.pending = rest.rpartition(b"\r")[2] if rest.count(b"\r") > 1 else rest
        if len(stream.pending) > _CHUNK:
            lines, stream.pending = [*lines, stream.pending], b""
        complete = [_last_state(line) for line in lines]
        if stream.log is not None:
            kept = [_COLOUR.sub(b"", line) for line in complete if not _MOVEMENT.search(line)]
            _write_all(stream.log, b"".join(line + b"\n" for line in kept))
        if stream.terminal is None or not show:
            return
        if stream.rank == 0:
            self._show(stream.terminal, data, starts_line=False)
        elif lines:
            prefix = self._prefix(stream)
            shown = [line for line in complete if not _MOVEMENT.search(line)]
            self._show(stream.terminal, b"".join(prefix + line + b"\n" for line in shown), starts_line=True)

    def _show(self, terminal: int, data: bytes, *, starts_line: bool) -> None:
        if not data:
            return
        status = os.fstat(terminal)
        place = (status.st_dev, status.st_ino)
        if not starts_line:
            if place in self._interrupted:
                self._interrupted.remove(place)
                data = data.removeprefix(b"\n")
            if data:
                self._at_line_start[place] = data[-1:] in b"\n\r"
                _write_all(terminal, data)
            if place in self._held:
                self._show_held(0.0)
        elif self._at_line_start.get(place, True):
            _write_all(terminal, data)
        else:
            _, before, until = self._held.get(place, (terminal, b"", time.monotonic() + _HOLD))
            self._held[place] = (terminal, before + data, until)

    def _show_held(self, now: float) -> None:
        """Show the lines that have waited for rank 0 until its line has ended, or until the time `now`."""
        for place, (terminal, data, until) in list(self._held.items()):
            if not self._at_line_start.get(place, True):
                if now < until:
                    continue
                # Rank 0 shows a progress bar or asks a question.
                self._interrupted.add(place)
                data = b"\n" + data
            self._at_line_start[place] = True
            del self._held[place]
            _write_all(terminal, data)

    def _prefix(self, stream: _Stream) -> bytes:
        name = f"[rank {stream.rank}]"
        if stream.kept_open is not None and not os.environ.get("NO_COLOR"):
            name = f"\x1b[{31 + stream.rank % 6}m{name}\x1b[0m"
        return f"{name} ".encode()

    def _resize(self) -> None:
        for stream in self._streams:
            if stream.kept_open is not None and stream.terminal is not None:
                _copy_size(stream.terminal, stream.kept_open)


def _take_terminal_back() -> None:
    """A rank that has read from the terminal has taken it; the kernel stops a background process that wants it."""
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        if os.tcgetpgrp(0) != os.getpgrp():
            os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, before)


def _make_pipe(path: Path) -> int:
    os.mkfifo(path, 0o600)
    # Open for writing too: it has no end before the attempt ends, also without a writer.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _make_terminal(path: Path, like: int) -> tuple[int, int]:
    """A pseudo-terminal that passes text on unchanged: its reader, and the side of the rank."""
    reader, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(reader, False)
    _copy_size(like, slave)
    path.symlink_to(os.ttyname(slave))
    return reader, slave


def _copy_size(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8)
        if size != fcntl.ioctl(target, termios.TIOCGWINSZ, b"\0" * 8):
            fcntl.ioctl(target, termios.TIOCSWINSZ, size)


def _has_data(reader: int) -> bool:
    return bool(select.select([reader], [], [], 0)[0]) or (not os.isatty(reader) and count_unread(reader) > 0)


def _last_state(line: bytes) -> bytes:
    return _ERASE.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    # A closed terminal, a closed pipe or a full disk.
    with contextlib.suppress(OSError):
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                select.select([], [descriptor], [])
