"""The standard streams of a rank whose agent copies its output: see `launcher.agent.rank_output`.

The agent makes a pipe or a pseudo-terminal for each stream of a rank before it starts the rank. They have names in the
attempt's folder, so that a process of the fork server can open them.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import sys
import termios
import time
from pathlib import Path
from typing import Any, TextIO

# Names of the streams by descriptor.
STREAMS = {1: "stdout", 2: "stderr"}
STDIN = "stdin"
# Seconds to wait until the agent has copied everything.
_DRAIN_TIMEOUT = 1.0


def stream_path(folder: Path, rank: int, descriptor: int) -> Path:
    """The pipe or terminal of a rank's stdout (1) or stderr (2) in the attempt's folder."""
    return folder / f"rank-{rank}.{STREAMS[descriptor]}"


def open_rank_streams(folder: Path, rank: int) -> None:
    """Use the agent's streams as this process's standard streams, if there are any; unbuffered, as `python -u`."""
    if not stream_path(folder, rank, 1).exists():
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for descriptor in STREAMS:
        _replace(descriptor, stream_path(folder, rank, descriptor), os.O_WRONLY | os.O_NOCTTY)
    sys.stdout = sys.__stdout__ = _unbuffered(sys.stdout, 1)
    sys.stderr = sys.__stderr__ = _unbuffered(sys.stderr, 2)
    # The agent's stdin may be a socket, which has no name; `multiprocessing` has opened /dev/null instead.
    with contextlib.suppress(OSError):
        _replace(0, folder / STDIN, os.O_RDONLY | os.O_NOCTTY)
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 -- as long as the process
        if os.isatty(0):
            signal.signal(signal.SIGTTIN, _take_terminal)


def await_copied() -> None:
    """Wait until the agent has copied what this process has written so far."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    give_up = time.monotonic() + _DRAIN_TIMEOUT
    while any(count_unread(descriptor) for descriptor in STREAMS) and time.monotonic() < give_up:
        time.sleep(0.002)


def count_unread(descriptor: int) -> int:
    """Bytes written to a pipe or a terminal that its reader has not taken yet."""
    try:
        request = termios.TIOCOUTQ if os.isatty(descriptor) else termios.FIONREAD
        return int.from_bytes(fcntl.ioctl(descriptor, request, b"\0\0\0\0"), sys.byteorder)
    except OSError:
        return 0  # a file


def _replace(descriptor: int, path: Path, flags: int) -> None:
    opened = os.open(path, flags)
    os.dup2(opened, descriptor)
    os.close(opened)


def _unbuffered(stream: TextIO, descriptor: int) -> TextIO:
    raw = io.FileIO(descriptor, "wb", closefd=False)
    setattr(raw, "name", f"<{STREAMS[descriptor]}>")  # noqa: B010 -- read-only in the stubs
    made: Any = raw
    return io.TextIOWrapper(made, encoding=stream.encoding, errors=stream.errors, line_buffering=raw.isatty(),
                            write_through=True)  # fmt: skip


def _take_terminal(number: int, frame: object) -> None:
    """Become the terminal's foreground group: the kernel sends SIGTTIN to a background process that reads."""
    del number, frame
    with contextlib.suppress(OSError):
        os.tcsetpgrp(0, os.getpgrp())
