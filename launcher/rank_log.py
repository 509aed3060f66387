"""Every rank's output in a file from the first byte; rank zero's on the terminal too.

A rank's bytes go to a pending file until the run directory is known, then the file moves there. Ranks above zero lose
the terminal. On rank zero Python's stdout stays a terminal (progress bars need one) and is copied to the file; what C
code and stderr write goes through a `tee`, which lives on to drain the pipe if this process is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TextIO

_REDRAW = re.compile(r"\r(?!\n)|\x1b\[\d*[A-HJK]|\x1b\[\?25")
_FOR_THE_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RankLog:
    """Where one rank's output goes. `attach` it first thing, `move_to` the run directory when it is known."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f".pending-{os.uname().nodename}-{os.getpid()}-rank-{rank}.log"
        self._rank = rank
        self._tee: subprocess.Popen[bytes] | None = None
        self._saved: tuple[int, int] | None = None
        self._python: tuple[TextIO, TextIO] | None = None
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
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = (os.dup(1), os.dup(2))
        self._python = (sys.stdout, sys.stderr)
        if self._rank != 0:
            for stream in (1, 2):
                os.dup2(descriptor, stream)
        else:
            self._attach_rank_zero(self._file)
        if faulthandler.is_enabled() or self._rank != 0:
            faulthandler.enable(self._file)

    def _attach_rank_zero(self, file: TextIO) -> None:
        assert self._saved is not None  # noqa: S101 -- attach() has just set it
        terminal = os.fdopen(os.dup(self._saved[0]), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        tee = shutil.which("tee")
        if tee is not None:
            # Signals to the whole group are for the trainer, which still has something to say. The file goes by its
            # descriptor: its name may change before tee has opened it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
            try:
                self._tee = subprocess.Popen(
                    [tee, "-a", f"/dev/fd/{file.fileno()}"],
                    stdin=subprocess.PIPE,
                    stdout=self._saved[1],
                    stderr=subprocess.DEVNULL,
                    pass_fds=(file.fileno(),),
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            assert self._tee.stdin is not None  # noqa: S101 -- PIPE was asked for
            for stream in (1, 2):
                os.dup2(self._tee.stdin.fileno(), stream)
        sys.stdout = _Copy(terminal, file)

    def move_to(self, path: Path) -> None:
        """Go on in `path`; what an earlier attempt of the rank left there is kept beside it, numbered."""
        if self._file is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sys.stdout.flush()
        if path.exists():
            path.rename(_free_name(path))
        # Writers hold the file, not its name.
        self._path.rename(path)
        self._path = path

    def detach(self) -> None:
        """Give the terminal back, so that the last words are on it; wait for the tee to have written everything."""
        if self._saved is None or self._python is None:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = self._python
        for stream, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, stream)
            os.close(saved)
        if self._tee is not None and self._tee.stdin is not None:
            _await_drained(self._tee.stdin.fileno())
            self._tee.stdin.close()
        self._saved = self._python = None

    def discard_pending(self) -> None:
        """Remove the file if the run never got a directory."""
        if self._path.name.startswith(".pending-"):
            # Where it could not be made there is nothing to remove.
            with contextlib.suppress(OSError):
                self._path.unlink()


class _Copy(io.TextIOBase):
    """Writes to the terminal and to the file; looks like the terminal."""

    def __init__(self, terminal: TextIO, file: TextIO) -> None:
        self._terminal = terminal
        self._copy = file

    def write(self, text: str, /) -> int:
        # A progress bar redraws itself: that is for the terminal alone. A full disk must not take the terminal away.
        if not _REDRAW.search(text):
            with contextlib.suppress(OSError):
                self._copy.write(_COLOUR.sub("", text))
        return self._terminal.write(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


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
