"""Stop all ranks at the same optimizer step, without a collective in any step.

A rank passes a gate at the end of each optimizer step. When one rank receives a signal, it informs the others over the
store. Each rank then reports how many gates it has passed and waits at its next gate until it knows the largest of
these numbers, at which all ranks stop: collectives of a rank that is ahead need the other ranks up to there. The
threads wait inside the store's C code; a step costs one lock.

The decision is one key, which the first writer sets: the last rank that reports its number, or a rank that timed out or
ends, which decides that no rank stops. All ranks wait for the same two keys and write one key each.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

# Seconds that a rank waits at a gate for the decision before it decides that no rank stops.
_ANSWER_TIMEOUT = 60.0
# Seconds that the end of a run waits for the listening thread, which returns at once unless the store is lost.
_END_TIMEOUT = 5.0
_FOREVER = timedelta(days=365)
# A gate that no training reaches: no rank stops.
_NEVER = 2**62
_ASKED, _STOP_AT, _REPORTED = "stop/asked", "stop/at", "stop/reported"
# Instead of a signal's number: a rank has ended, so no stop can be agreed on any more.
_ENDED = "0"


class StopAgreement:
    """The ranks' common decision at which step to stop. The store has keys of this attempt only."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store: Any = store if world_size > 1 else None
        self._rank = rank
        self._world_size = world_size
        self._changed = threading.Condition()
        self._gates = 0
        self._asked = False
        self._answered = False
        self._stop_at: int | None = None
        self._closed = False
        self._store_lost = False
        self._own_client: Any = None
        self._watcher: threading.Thread | None = None
        self.signal_number: int = signal.SIGTERM

    def start(self) -> None:
        """Start listening to the other ranks."""
        if self._store is not None:
            self._watcher = threading.Thread(target=self._watch, name="launcher-stop-watch", daemon=True)
            self._watcher.start()

    def expect(self) -> None:
        """Make this rank's next gate wait for the decision. Takes no lock, as a signal handler calls it."""
        self._asked = True

    def request(self, signal_number: int) -> None:
        """Ask all ranks to stop at the end of the step that the most advanced rank is in."""
        self.expect()
        if self._store is None:
            with self._changed:
                self._stop_at, self._answered, self.signal_number = self._gates, True, signal_number
                # The main thread may be at its gate already.
                self._changed.notify_all()
            return
        # The main thread may be blocking the store's own connection, and a new one may take seconds.
        client = self._own_client or self._store.clone()
        client.compare_set(_ASKED, "", str(signal_number))

    def gate(self) -> bool:
        """Pass the end of an optimizer step; True means stop here. The main thread of every rank calls it."""
        with self._changed:
            if self._asked and not self._answered:
                self._changed.wait_for(lambda: self._answered or self._store_lost, _ANSWER_TIMEOUT)
                if not self._answered:
                    # No later gate waits again.
                    self._stop_at, self._answered = self._decide_late(), True
            if self._stop_at is not None and self._gates >= self._stop_at:
                return True
            self._gates += 1
            return False

    def _decide_late(self) -> int | None:
        """Read the decision, or decide that no rank stops. Has no timeout, as the other ranks rely on the decision."""
        # A lost store means that the run is ending: there is nothing to agree on.
        with suppress(RuntimeError):
            # If all ranks have reported, only the thread that writes the decision is late.
            has_all = self._store.check([_REPORTED]) and int(self._store.add(_REPORTED, 0)) == self._world_size
            return self._decide(self._store, self._common_gate(self._store) if has_all else _NEVER)

    def close(self) -> None:
        """End the listening thread; the gates of other ranks no longer wait for this rank."""
        self._closed = True
        if self._store is not None:
            with suppress(RuntimeError):
                self._decide(self._store, _NEVER)
                self._store.compare_set(_ASKED, "", _ENDED)
        if self._watcher is not None:
            # A thread that wakes inside the store's C++ code after Python has ended aborts the process.
            self._watcher.join(_END_TIMEOUT)

    def _watch(self) -> None:
        """Wait for a request, then for the decision."""
        try:
            self._own_client = self._store.clone()
            stop_at = self._agree(self._store.clone())
        except RuntimeError:
            # The store's server or this connection has ended. The gate acts on it.
            with self._changed:
                self._store_lost = True
                self._changed.notify_all()
            return
        with self._changed:
            self._stop_at, self._answered = stop_at, True
            self._changed.notify_all()

    def _agree(self, client: Any) -> int:
        client.wait([_ASKED], _FOREVER)
        asked = client.get(_ASKED).decode()
        if asked != _ENDED and not self._closed:
            with self._changed:
                self._asked = True
                self.signal_number = int(asked)
                client.set(_gates_key(self._rank), str(self._gates))
            if client.add(_REPORTED, 1) == self._world_size:
                self._decide(client, self._common_gate(client))
        client.wait([_STOP_AT], _FOREVER)
        return int(client.get(_STOP_AT))

    def _common_gate(self, client: Any) -> int:
        """The largest number of gates that a rank has passed, once all ranks have reported."""
        return max(int(value) for value in client.multi_get([_gates_key(rank) for rank in range(self._world_size)]))

    def _decide(self, client: Any, stop_at: int) -> int:
        """Write the decision unless there is one; return the decision that holds."""
        return int(client.compare_set(_STOP_AT, "", str(stop_at)))


def _gates_key(rank: int) -> str:
    return f"stop/gates/{rank}"
