"""Writes to the W&B run from a thread of its own, so that a slow or broken W&B never holds a training up."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

_log = logging.getLogger(__name__)


class WandbWriter:
    """A bounded queue before `wandb.log`. What finds it full is dropped, and counted.

    Args:
        capacity: rows that may wait.

    Raises:
        ValueError: nothing may wait, which Python's queue would take for no bound.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least one row must be able to wait; give 1 or more")
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._pending = 0
        self.dropped = 0
        self._told = False

    def put(self, write: Callable[[], None]) -> bool:
        """Have `write` called by the thread; False if the queue is full and it was dropped.

        Args:
            write: one row or alert; what it raises is told once, and counted as dropped.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="launcher-wandb-writer", daemon=True)
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
        """Wait until everything is written; whether it was.

        Args:
            timeout: seconds.
        """
        return self._idle.wait(timeout)

    def close(self, timeout: float) -> int:
        """Write what can be written in time, and end.

        Args:
            timeout: seconds.

        Returns:
            How many rows and alerts were dropped in all.
        """
        if not self.flush(timeout):
            with self._lock:
                # The one that is being written may still get through; those behind it will not.
                while True:
                    try:
                        self._waiting.get_nowait()
                    except queue.Empty:
                        break
                    self._pending -= 1
                    self.dropped += 1
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(0.1)
            self._thread = None
        return self.dropped

    def _work(self) -> None:
        while (write := self._waiting.get()) is not None:
            try:
                write()
            except Exception as error:  # noqa: BLE001 -- W&B raises many kinds, and none may stop a training
                with self._lock:
                    self.dropped += 1
                if not self._told:
                    self._told = True
                    _log.warning("W&B did not take a row: %s: %s; the training goes on", type(error).__name__, error)
            with self._lock:
                self._pending -= 1
                if not self._pending:
                    self._idle.set()


def log_row(wandb: Any, row: Mapping[str, Any], step: int, *, at_next: bool = False) -> None:
    """One row at a step that W&B takes.

    W&B drops a row below its own step, which Lightning's logger moves by one with each of its calls. The true step is
    in the row, and the charts are drawn against it.

    Args:
        wandb: the module.
        row: metrics by name.
        step: optimizer steps done.
        at_next: let W&B count the row as the next one. Between asking for its step and naming one, another thread may
            log a row, and this one would be dropped.
    """
    if at_next:
        wandb.log({**row, "trainer/global_step": step}, commit=True)
        return
    current = getattr(wandb.run, "step", None)
    at = step if not isinstance(current, int) or step >= current else current + 1
    # At once: W&B keeps a row with a step open, and Lightning's next row would be put into it, with its own true step.
    wandb.log({**row, "trainer/global_step": step}, step=at, commit=True)
