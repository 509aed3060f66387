"""Writes rows from a background thread, so that a slow or broken tracker never delays a training step."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class RowQueue:
    """A bounded queue of writes to one tracker. Writes that find it full are dropped and counted.

    Raises:
        ValueError: the capacity is below 1, which Python's queue would take for unbounded.
    """

    def __init__(self, capacity: int = 256, tracker: str = "W&B") -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least one row must be able to wait; give 1 or more")
        self._tracker = tracker
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._pending = 0
        self.dropped = 0
        self._has_warned = False

    def put(self, write: Callable[[], None]) -> bool:
        """Have the thread call `write`; False if the queue is full. A write that is dropped or raises is counted."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="launcher-row-queue", daemon=True)
                self._thread.start()
            try:
                self._waiting.put_nowait(write)
            except queue.Full:
                self.dropped += 1
                return False
            self._pending += 1
            self._idle.clear()
            return True

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until everything is written; return whether it is."""
        return self._idle.wait(timeout)

    def close(self, timeout: float) -> int:
        """Write what is possible within `timeout` seconds, end the thread, and return how many writes were dropped."""
        if self._thread is None:
            return self.dropped
        if not self.flush(timeout):
            # The write that is running may still succeed; later ones are dropped.
            with self._lock, contextlib.suppress(queue.Empty):
                while True:
                    if self._waiting.get_nowait() is not None:
                        self._pending -= 1
                        self.dropped += 1
        self._waiting.put(None)
        self._thread.join(0.1)
        self._thread = None
        return self.dropped

    def _work(self) -> None:
        while (write := self._waiting.get()) is not None:
            try:
                write()
            except Exception as error:  # noqa: BLE001 -- trackers raise many kinds, and none may stop a training
                with self._lock:
                    self.dropped += 1
                if not self._has_warned:
                    self._has_warned = True
                    _log.warning(
                        "%s did not accept a row: %s: %s; training continues",
                        self._tracker, type(error).__name__, error,
                    )  # fmt: skip
            with self._lock:
                self._pending -= 1
                if not self._pending:
                    self._idle.set()
