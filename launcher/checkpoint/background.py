"""Writes one checkpoint at a time beside the training."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

# A writer with less of a busy processor than the training: on Linux a thread has its own.
_NICENESS = 5


class BackgroundWriter:
    """Runs the write of one checkpoint in a thread. Its methods are for the thread that trains.

    A write that fails raises its error in the next call of `check`, `wait` or `opened`, once. The actions that follow
    a write run only if it succeeds.
    """

    def __init__(self, notice: Callable[[str], None] = lambda text: None) -> None:
        """`notice` receives a text if a checkpoint is written in the foreground instead."""
        self._notice = notice
        self._has_declined = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # What follows the write; None if nothing is being written.
        self._actions: list[Callable[[], None]] | None = None
        self._is_open = False
        self.seconds = 0.0  # of the last write

    @property
    def accepts(self) -> bool:
        """Whether a save that happens now may hand over its write: `opened` is on, and has none yet."""
        return self._is_open and self._thread is None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Accept the write of a save inside, after the write before it. A save may also write by itself."""
        self.wait()
        self._is_open, self._actions = True, []
        try:
            yield
        except BaseException:  # Ctrl-C too: nothing follows a save that did not begin to write; raised on
            if self._thread is None:
                self._actions = None
            raise
        finally:
            self._is_open = False
        if self._thread is None:
            self._run(lambda: None)
            self.check()

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write; called where `accepts` is true."""
        self._thread = threading.Thread(target=self._run, args=(write,), name="launcher-checkpoint")
        self._thread.start()

    def decline(self, reason: str) -> None:
        """Give a notice, the first time, that the save that happens now writes by itself."""
        if not self._has_declined:
            self._has_declined = True
            self._notice(f"checkpoints are written while the training waits: {reason}")

    def after_write(self, action: Callable[[], None]) -> None:
        """Run `action` when the checkpoint that is being written is complete; at once if none is."""
        with self._lock:
            if self._error is not None:
                return
            if self._actions is not None:
                self._actions.append(action)
                return
        action()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is None and self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until nothing is being written; raise the error of a write that has failed."""
        # An action of the write may read what calls this.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self.check()

    def _run(self, write: Callable[[], None]) -> None:
        if self._thread is not None and sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        begun = time.monotonic()
        try:
            write()
            self.seconds = time.monotonic() - begun
            while (action := self._next_action()) is not None:
                action()
        except BaseException as error:  # noqa: BLE001 -- raised by the thread that trains
            with self._lock:
                self._error, self._actions = error, None

    def _next_action(self) -> Callable[[], None] | None:
        with self._lock:
            if self._actions:
                return self._actions.pop(0)
            self._actions = None
            return None
