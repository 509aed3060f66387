"""Writes every rank's output to a file from the first byte, and rank zero's output to the terminal too.

A rank writes to a pending file until the run directory is known; then the file is moved there. On rank zero Python's
stdout stays a terminal (progress bars need one) and is copied to the file; the output of C code and of stderr goes
through a `tee`, which still drains the pipe if this process is killed. For the other ranks that are shown, `sed`
prefixes each line with the rank. A full disk or a closed terminal loses output, but never stops the training. If user
code has replaced a stream by its own object, the object stays, and its text is copied to the file.
"""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import fcntl
import io
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from typing_extensions import Buffer

from launcher.process.parent_death import STOP_SIGNALS
from launcher.process.standard_streams import LoggedStream, is_plain, open_missing_streams, writes_to_standard_stream

_REDRAW = re.compile(r"\r(?!\n)|\x1b\[\d*[A-HJK]|\x1b\[\?25")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RankLog:
    """The log file of one rank. Call `attach` first, and `move_to` when the run directory is known.

    Args:
        terminal_ranks: the ranks whose output is shown on the terminal; None means all.
    """

    def __init__(self, folder: Path, rank: int, terminal_ranks: Collection[int] | None = (0,)) -> None:
        name = f".pending-{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}-rank-{rank}.log"
        self._path = folder / name
        self._rank = rank
        self._shown = terminal_ranks is None or rank in terminal_ranks
        self._tee: subprocess.Popen[bytes] | None = None
        self._sed: subprocess.Popen[bytes] | None = None
        self._saved: tuple[int, int] | None = None
        self._python: tuple[TextIO, TextIO] | None = None
        self._streams: tuple[TextIO, TextIO] | None = None
        self._file: TextIO | None = None

    @property
    def path(self) -> Path:
        """The current file."""
        return self._path

    def attach(self) -> None:
        """Redirect the output of this process to the file.

        Raises:
            OSError: the folder cannot be created or written.
        """
        open_missing_streams()
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # O_EXCL: in a shared folder another user may have created a link of this name.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        _flush_all()
        self._saved = (os.dup(1), os.dup(2))
        self._python = (sys.stdout, sys.stderr)
        terminal: BinaryIO | None = None
        if not self._shown:
            for stream in (1, 2):
                os.dup2(descriptor, stream)
        elif self._rank == 0:
            terminal = os.fdopen(os.dup(self._saved[0]), "wb")
            self._start_tee(self._file, self._saved[1])
        else:
            self._start_tee(self._file, self._prefixed())
        self._streams = (self._stream(sys.stdout, 1, terminal), self._stream(sys.stderr, 2))
        sys.stdout, sys.stderr = self._streams
        if faulthandler.is_enabled() or self._rank != 0:
            faulthandler.enable(self._file)

    def _stream(self, stream: TextIO, descriptor: int, terminal: BinaryIO | None = None) -> TextIO:
        """The replacement of one of Python's streams while the log is attached; `terminal` receives the text too."""
        assert self._file is not None  # noqa: S101 -- attach() has just set it
        if not is_plain(stream, descriptor):
            # Once in the file: text that the object passes on to descriptor 1 or 2 is there already.
            is_logged = (self._tee is not None or self._rank != 0) and writes_to_standard_stream(stream)
            return cast(TextIO, LoggedStream(stream, None if is_logged else _without_redraws(self._file)))
        if terminal is None:
            return _tolerant(stream)
        # Write-through: each write reaches `_TeeStream` alone, which leaves redraws of the terminal out of the file.
        return io.TextIOWrapper(_TeeStream(terminal, self._file), encoding="utf-8", errors="backslashreplace",
                                line_buffering=True, write_through=True)  # fmt: skip

    def _prefixed(self) -> int:
        """A descriptor whose lines reach the terminal prefixed with the rank."""
        assert self._saved is not None  # noqa: S101 -- attach() has just set it
        sed = shutil.which("sed")
        if sed is None:
            return self._saved[1]
        name = f"[rank {self._rank}]"
        if os.isatty(self._saved[1]) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            name = f"\x1b[{31 + self._rank % 6}m{name}\x1b[0m"
        process = _start_filter([sed, "-u", f"s/^/{name} /"], self._saved[1])
        assert process.stdin is not None  # noqa: S101 -- stdin is PIPE
        self._sed = process
        return process.stdin.fileno()

    def _start_tee(self, file: TextIO, terminal: int) -> None:
        tee = shutil.which("tee")
        if tee is not None:
            # By descriptor: the file's name may change before tee opens it. -p: the file stays complete when a reader
            # of the output closes the pipe.
            self._tee = _start_filter([tee, "-p", "-a", f"/dev/fd/{file.fileno()}"], terminal, file.fileno())
            assert self._tee.stdin is not None  # noqa: S101 -- stdin is PIPE
            for stream in (1, 2):
                os.dup2(self._tee.stdin.fileno(), stream)
        elif self._rank != 0:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        if self._sed is not None and self._sed.stdin is not None:
            # The tee holds the other copy: sed ends with the tee.
            self._sed.stdin.close()

    def move_to(self, path: Path) -> None:
        """Move the file to `path`; the log of an earlier attempt there gets a number in its name."""
        if self._file is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _flush_all()
        if path.exists():
            path.rename(name_earlier_log(path))
        # All writers have the file open by descriptor.
        self._path.rename(path)
        self._path = path

    def detach(self) -> None:
        """Restore the terminal for the last messages, after the tee has written everything."""
        if self._saved is None or self._python is None or self._streams is None:
            return
        _flush_all()
        # A stream that user code has installed in the meantime stays.
        if sys.stdout is self._streams[0]:
            sys.stdout = self._python[0]
        if sys.stderr is self._streams[1]:
            sys.stderr = self._python[1]
        # Text that a full disk did not take must not raise again at the end of the process.
        _flush_all()
        for stream, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, stream)
            os.close(saved)
        if self._tee is not None and self._tee.stdin is not None:
            _await_drained(self._tee.stdin.fileno())
            self._tee.stdin.close()
        self._saved = self._python = self._streams = None

    def discard_pending(self) -> None:
        """Remove the file if the run never had a directory."""
        if self._path.name.startswith(".pending-"):
            # It may not exist.
            with contextlib.suppress(OSError):
                self._path.unlink()


def _flush_all() -> None:
    """Flush Python's buffers; a stream may be closed, or its disk full."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            cast(TextIO, stream).flush()


def _start_filter(command: list[str], output: int, *passed: int) -> subprocess.Popen[bytes]:
    """Start a program that passes text on; it blocks the signals after which the trainer still writes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, pass_fds=passed
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tolerant(stream: TextIO) -> TextIO:
    """The same text file; errors lose text instead of being raised."""
    return io.TextIOWrapper(
        _TolerantStream(cast(BinaryIO, stream.buffer)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=True,
    )


class _TolerantStream(io.BufferedIOBase):
    """The bytes of a standard stream; they are lost on a full disk, or if the terminal or the reader is closed.

    `close` keeps the stream open: it is restored later, and a user's wrapper would close it when it is deleted.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: Buffer, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        with contextlib.suppress(OSError):
            # An unbuffered stream may take a part, or nothing while its reader is slow.
            while rest and (written := self._stream.write(rest)):
                rest = rest[written:]
        return size

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it may be closed already
            self._stream.flush()

    def close(self) -> None:
        self.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def name(self) -> object:
        return getattr(self._stream, "name", None)


class _TeeStream(_TolerantStream):
    """Writes to the terminal and to the file; appears as the terminal."""

    def __init__(self, terminal: BinaryIO, file: TextIO) -> None:
        super().__init__(terminal)
        self._log = _without_redraws(file)
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, data: Buffer, /) -> int:
        # A full disk must not stop the terminal.
        with contextlib.suppress(OSError):
            self._log(self._decoder.decode(bytes(data)))
        return super().write(data)

    def fileno(self) -> int:
        # Descriptor 1 is the tee, so the file has the output of child processes. A terminal keeps its own for its size.
        return super().fileno() if self.isatty() else 1


def _without_redraws(file: TextIO) -> Callable[[str], None]:
    """A function that writes text to the file, except the redraws of a progress bar."""

    def write(text: str) -> None:
        if not _REDRAW.search(text):
            file.write(_COLOUR.sub("", text))

    return write


def read_tail(path: Path, size: int) -> str:
    """The last `size` bytes of a file as text; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _await_drained(pipe: int, limit: float = 1.0) -> None:
    """Wait until `tee` has read the pipe. Not until it ends: W&B's service holds the pipe open too."""
    give_up = time.monotonic() + limit
    while time.monotonic() < give_up:
        unread = fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0")
        if unread == b"\0\0\0\0":
            return
        time.sleep(0.005)


def name_earlier_log(path: Path) -> Path:
    """`rank-0.1.log`, `rank-0.2.log`, ...: the logs of earlier attempts, oldest first."""
    return next(p for n in range(1, 100_000) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
