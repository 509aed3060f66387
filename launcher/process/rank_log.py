"""Every rank's output in a file from the first byte; rank zero's on the terminal too.

A rank's bytes go to a pending file until the run directory is known, then the file moves there. Ranks that are not to
be shown lose the terminal. On rank zero Python's stdout stays a terminal (progress bars need one) and is copied to the
file; what C code and stderr write goes through a `tee`, which lives on to drain the pipe if this process is killed.
Other ranks that are shown have each line go through `sed` too, which puts the rank before it. A disk that is full and
a terminal that is gone cost output, never the training. An object that the user has put in a stream's place stays
there; its text is copied to the file.
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

from launcher.process.standard_streams import LoggedStream, is_plain, open_missing_streams, writes_to_standard_stream

_REDRAW = re.compile(r"\r(?!\n)|\x1b\[\d*[A-HJK]|\x1b\[\?25")
_FOR_THE_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RankLog:
    """Where one rank's output goes. `attach` it first thing, `move_to` the run directory when it is known.

    Args:
        folder: of the pending file.
        rank: this rank.
        terminal_ranks: the ranks that are shown on the terminal; None means all.
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
        self._ours: tuple[TextIO, TextIO] | None = None
        self._file: TextIO | None = None

    @property
    def path(self) -> Path:
        """The file that the output is in now."""
        return self._path

    def attach(self) -> None:
        """Begin: from here on, what this process prints is in the file.

        Raises:
            OSError: the folder cannot be made or written.
        """
        open_missing_streams()
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # New: in a folder that others share, one of them may have laid a link there.
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
        self._ours = (self._stream(sys.stdout, 1, terminal), self._stream(sys.stderr, 2))
        sys.stdout, sys.stderr = self._ours
        if faulthandler.is_enabled() or self._rank != 0:
            faulthandler.enable(self._file)

    def _stream(self, stream: TextIO, descriptor: int, terminal: BinaryIO | None = None) -> TextIO:
        """What stands for one of Python's streams while the log is attached; `terminal` has the text, too."""
        assert self._file is not None  # noqa: S101 -- attach() has just set it
        if not is_plain(stream, descriptor):
            # Once in the file: where it passes its text on to descriptor 1 or 2, that goes there already.
            is_logged = (self._tee is not None or self._rank != 0) and writes_to_standard_stream(stream)
            return cast(TextIO, LoggedStream(stream, None if is_logged else _without_redraws(self._file)))
        if terminal is None:
            return _steadfast(stream)
        # Whole writes, as what redraws the terminal is left out of the file.
        return io.TextIOWrapper(_Copy(terminal, self._file), encoding="utf-8", errors="backslashreplace",
                                line_buffering=True, write_through=True)  # fmt: skip

    def _prefixed(self) -> int:
        """A descriptor whose lines reach the terminal with the rank before them."""
        assert self._saved is not None  # noqa: S101 -- attach() has just set it
        sed = shutil.which("sed")
        if sed is None:
            return self._saved[1]
        name = f"[rank {self._rank}]"
        if os.isatty(self._saved[1]) and not os.environ.get("NO_COLOR"):
            name = f"\x1b[{31 + self._rank % 6}m{name}\x1b[0m"
        process = _start_filter([sed, "-u", f"s/^/{name} /"], self._saved[1])
        assert process.stdin is not None  # noqa: S101 -- PIPE was asked for
        self._sed = process
        return process.stdin.fileno()

    def _start_tee(self, file: TextIO, terminal: int) -> None:
        """Send what C code and stderr write to the terminal and to the file."""
        tee = shutil.which("tee")
        if tee is not None:
            # The file goes by its descriptor: its name may change before tee has opened it. A reader of our output that
            # leaves (-p) must not end the file's copy.
            self._tee = _start_filter([tee, "-p", "-a", f"/dev/fd/{file.fileno()}"], terminal, file.fileno())
            assert self._tee.stdin is not None  # noqa: S101 -- PIPE was asked for
            for stream in (1, 2):
                os.dup2(self._tee.stdin.fileno(), stream)
        elif self._rank != 0:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        if self._sed is not None and self._sed.stdin is not None:
            # The tee holds its end: the prefixes stop with it.
            self._sed.stdin.close()

    def move_to(self, path: Path) -> None:
        """Go on in `path`; what an earlier attempt of the rank left there is kept beside it, numbered."""
        if self._file is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _flush_all()
        if path.exists():
            path.rename(_free_name(path))
        # Writers hold the file, not its name.
        self._path.rename(path)
        self._path = path

    def detach(self) -> None:
        """Give the terminal back, so that the last words are on it; wait for the tee to have written everything."""
        if self._saved is None or self._python is None or self._ours is None:
            return
        _flush_all()
        # What user code has put there meanwhile stays.
        if sys.stdout is self._ours[0]:
            sys.stdout = self._python[0]
        if sys.stderr is self._ours[1]:
            sys.stderr = self._python[1]
        # What a full disk refused must not be refused again at the end of the process.
        _flush_all()
        for stream, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, stream)
            os.close(saved)
        if self._tee is not None and self._tee.stdin is not None:
            _await_drained(self._tee.stdin.fileno())
            self._tee.stdin.close()
        self._saved = self._python = self._ours = None

    def discard_pending(self) -> None:
        """Remove the file if the run never got a directory."""
        if self._path.name.startswith(".pending-"):
            # Where it could not be made there is nothing to remove.
            with contextlib.suppress(OSError):
                self._path.unlink()


def _flush_all() -> None:
    """Hand on what is still in Python's buffers; a stream may be closed, or its disk full."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            cast(TextIO, stream).flush()


def _start_filter(command: list[str], output: int, *passed: int) -> subprocess.Popen[bytes]:
    """Start a program that takes text and hands it on. Signals to the whole group are for the trainer, which still has
    something to say.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, pass_fds=passed
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _steadfast(stream: TextIO) -> TextIO:
    """The same text file, which loses text rather than raise."""
    return io.TextIOWrapper(
        _TolerantStream(cast(BinaryIO, stream.buffer)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=True,
    )


class _TolerantStream(io.BufferedIOBase):
    """The bytes of a standard stream; they are lost on a full disk, or when the terminal or the reader is gone.

    It stays open: the process's own stream below comes back, and a wrapper of the user's would close it when it goes.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, data: Buffer, /) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        with contextlib.suppress(OSError):
            # An unbuffered one may take a part, or nothing while its reader is slow.
            while left and (written := self._stream.write(left)):
                left = left[written:]
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


class _Copy(_TolerantStream):
    """Writes to the terminal and to the file; looks like the terminal."""

    def __init__(self, terminal: BinaryIO, file: TextIO) -> None:
        super().__init__(terminal)
        self._log = _without_redraws(file)
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, data: Buffer, /) -> int:
        # A full disk must not take the terminal away.
        with contextlib.suppress(OSError):
            self._log(self._decoder.decode(bytes(data)))
        return super().write(data)

    def fileno(self) -> int:
        # What a child writes there is to be in the file too. A terminal is asked for its size.
        return super().fileno() if self.isatty() else 1


def _without_redraws(file: TextIO) -> Callable[[str], None]:
    """Writes text to the file; a progress bar redraws itself: that is for the terminal alone."""

    def write(text: str) -> None:
        if not _REDRAW.search(text):
            file.write(_COLOUR.sub("", text))

    return write


def _await_drained(pipe: int, limit: float = 1.0) -> None:
    """Wait until `tee` has taken what is in the pipe. Its end can't be waited for: W&B's service holds the pipe too."""
    give_up = time.monotonic() + limit
    while time.monotonic() < give_up:
        unread = fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0")
        if unread == b"\0\0\0\0":
            return
        time.sleep(0.005)


def _free_name(path: Path) -> Path:
    """`rank-0.1.log`, `rank-0.2.log`, ...: the logs of earlier attempts, oldest first."""
    return next(p for n in range(1, 100_000) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
