"""Receive signals during a training and hand them to the ranks' `StopAgreement`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from launcher.process.ctrl_c import CtrlC
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.progress import StopProgress

# From a person, a scheduler that warns or ends the job, or a closed terminal: all mean "save and stop".
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# A script's own handler of these is kept: a process that handles them is not ended by them.
_FOR_SCRIPTS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
# Seconds. A second signal sooner than this is the first one, forwarded by torchrun's agent.
_SECOND_AFTER = 2.0


class SignalListener:
    """Hands signals to a `StopAgreement`, also while the main thread is inside a collective.

    The C-level handler writes the signal's number to a socket, and a thread reads it. A second Ctrl-C ends the process
    at once. So does a second SIGTERM if no agent forwards signals.

    Args:
        agreement: gets the signals.
        on_request: called with the first signal.
        on_second: called with the second signal, before the process ends.
        progress: what the training is doing; `GracefulStop` updates it.
        has_agent: whether the launcher's agent forwards signals as SIGTERM, and ends its ranks itself when needed.
        has_scheduler: whether SIGHUP, SIGUSR1 or SIGUSR2 may be a scheduler's warning; otherwise a script's handlers
            for them are kept.
    """

    def __init__(
        self,
        agreement: StopAgreement,
        on_request: Callable[[int], None],
        on_second: Callable[[int], None] | None = None,
        *,
        progress: StopProgress | None = None,
        has_agent: bool = False,
        has_scheduler: bool = False,
    ) -> None:
        self._agreement = agreement
        self._on_request = on_request
        self._on_second = on_second or _print_second
        self.progress = StopProgress() if progress is None else progress
        self._has_agent = has_agent
        self._takes_all = has_agent or has_scheduler
        self._reader: socket.socket
        self._writer: socket.socket
        self._before: dict[int, Any] = {}
        self._before_fd = -1
        # The first signal that this rank received.
        self.first: int | None = None
        self._since = 0.0
        self._closed = False

    @property
    def users_handler(self) -> Callable[[], Any] | None:
        """Calls the script's own handler of that signal; None if it has none."""
        handler: Any = None if self.first is None else self._before[self.first]
        return partial(handler, self.first, None) if _is_users(handler) else None

    def __enter__(self) -> SignalListener:
        CtrlC.raise_lost()
        if threading.current_thread() is not threading.main_thread():
            # Python delivers signals to the main thread only, which belongs to other code here.
            self._closed = True
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # Ignored signals stay ignored: `nohup` ignores SIGHUP, the launcher's SLURM job its own warning signal.
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {
            number: handler
            for number, handler in handlers.items()
            if handler not in (signal.SIG_IGN, None) and not (number in _FOR_SCRIPTS and self._is_kept(number, handler))
        }
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.install()
        # A data loader's worker is a fork of this process and must end on its own signals.
        # The interpreter keeps the function until it ends, and this object refers to the Trainer.
        reset = weakref.WeakMethod(self._reset_in_child)
        os.register_at_fork(after_in_child=lambda: (found := reset()) is not None and found())
        threading.Thread(target=self._listen, name="launcher-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._closed:
            return
        self._closed = True
        # The handlers first: a signal between the two steps must not get lost.
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()

    def _is_kept(self, number: int, handler: Any) -> bool:
        return not self._takes_all and (_is_users(handler) or (handler == signal.SIG_DFL and _is_caught(number)))

    def _reset_in_child(self) -> None:
        if not self._closed:
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)

    def install(self) -> None:
        """Install the handlers, again after Lightning: its SIGTERM handler starts a collective on one rank only."""
        for number in () if self._closed else self._before:
            signal.signal(number, self._wake)

    def _wake(self, signum: int, frame: object) -> None:
        """The socket already has the signal's number; the step that the main thread is in should be the last one."""
        self._agreement.expect()

    def _listen(self) -> None:
        while data := self._reader.recv(16):
            for number in data:
                if number in self._before:
                    self._handle(number)
        self._reader.close()

    def _handle(self, number: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = number, now
            with suppress(RuntimeError):
                self._agreement.request(number)
            self._on_request(number)
        elif now - self._since > _SECOND_AFTER and self._ends_at_once(number):
            self._on_second(number)
            os._exit(128 + number)

    def _ends_at_once(self, number: int) -> bool:
        """A scheduler sends SIGTERM after its warning (USR1, USR2), which must not interrupt the save."""
        return number == signal.SIGINT or (number == signal.SIGTERM == self.first and not self._has_agent)


def write_line(text: str) -> None:
    """Write to the terminal, without `sys.stderr`'s lock, which the main thread may have."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


def _print_second(number: int) -> None:
    what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    write_line(f"second {what}: ending at once")


def _is_users(handler: Any) -> bool:
    """Whether a script has set this handler, not Python, Lightning or the launcher."""
    module = str(getattr(handler, "__module__", None))
    is_ours = module.partition(".")[0] in ("lightning", "launcher")
    return callable(handler) and handler is not signal.default_int_handler and not is_ours


def _is_caught(number: int) -> bool:
    """Whether the process catches the signal, possibly in C code such as `faulthandler`'s, unknown to Python."""
    with suppress(OSError, StopIteration, ValueError):  # not Linux
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)
    return False
