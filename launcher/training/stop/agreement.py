"""Stop all ranks at the same optimizer step, without a collective in any step.

A rank passes a gate at the end of each optimizer step. When one rank gets a signal it tells the others over the store;
each rank then tells how many gates it has passed and waits at its next gate until it knows the largest such number.
That is where all of them stop: a rank that is ahead is in a step whose collectives need the others, and they come, as
their gates let them through up to that number. The threads wait inside the store's C code; a step costs one lock.

The decision is one key that is written once, by whoever comes first: the last rank to tell its number, which knows all
of them; or a rank that has waited too long for another, or ends, which writes that nobody stops. Whatever comes late
finds that decision. All ranks wait for the same two keys and write one of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

# A person, a scheduler that warns or ends, a terminal that closes: all mean "save and stop".
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Of these a script's own handler is left alone: they end nothing in a process that has one.
_FOR_SCRIPTS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A second one sooner than this is torchrun's agent handing the first one on.
_SECOND_AFTER = 2.0
# Seconds that a rank waits at a gate for the decision before it decides that nobody stops.
_ANSWER_TIMEOUT = 60.0
# Seconds that the end of a run waits for the listening thread; it needs a moment unless the store is gone.
_END_TIMEOUT = 5.0
_FOREVER = timedelta(days=365)
# A gate that no training reaches: nobody stops.
_NEVER = 2**62
_ASKED, _STOP_AT, _TOLD = "stop/asked", "stop/at", "stop/told"
# Instead of a signal's number: a rank has ended, so there is nothing to ask any more.
_ENDED = "0"


class StopAgreement:
    """The ranks' common decision where to stop.

    Args:
        store: shared by the ranks, of this attempt alone; None with one rank.
        rank: this rank.
        world_size: number of ranks.
    """

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
        """Begin to listen to the other ranks."""
        if self._store is not None:
            self._watcher = threading.Thread(target=self._watch, name="launcher-stop-watch", daemon=True)
            self._watcher.start()

    def expect(self) -> None:
        """This rank has a signal: its next gate waits for the answer. No lock, as a signal handler calls it."""
        self._asked = True

    def request(self, signal_number: int) -> None:
        """Ask all ranks to stop at the end of the step that the furthest one is in."""
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
        """Pass the end of an optimizer step; True: stop here. The main thread calls it, on every rank equally often."""
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
        """What was decided meanwhile, else that nobody stops. It takes as long as it takes: the others rely on it."""
        # A lost store means that the run is ending: nothing is left to agree on.
        with suppress(RuntimeError):
            # Only the thread that is to write it may be late: what all have told makes the decision.
            everybody = self._store.check([_TOLD]) and int(self._store.add(_TOLD, 0)) == self._world_size
            return self._decide(self._store, self._common_gate(self._store) if everybody else _NEVER)

    def close(self) -> None:
        """End the listening thread; the others' gates do not wait for this rank any more."""
        self._closed = True
        if self._store is not None:
            with suppress(RuntimeError):
                self._decide(self._store, _NEVER)
                self._store.compare_set(_ASKED, "", _ENDED)
        if self._watcher is not None:
            # A thread that wakes inside the store's C++ code after Python has ended aborts the process.
            self._watcher.join(_END_TIMEOUT)

    def _watch(self) -> None:
        """Wait until somebody asks, then for the decision."""
        try:
            self._own_client = self._store.clone()
            stop_at = self._agree(self._store.clone())
        except RuntimeError:
            # Its server has ended, or this connection: the gate finds out.
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
            if client.add(_TOLD, 1) == self._world_size:
                self._decide(client, self._common_gate(client))
        client.wait([_STOP_AT], _FOREVER)
        return int(client.get(_STOP_AT))

    def _common_gate(self, client: Any) -> int:
        """The largest number of gates that a rank has passed, once all have told theirs."""
        return max(int(value) for value in client.multi_get([_gates_key(rank) for rank in range(self._world_size)]))

    def _decide(self, client: Any, stop_at: int) -> int:
        """Decide unless somebody has; returns what is decided."""
        return int(client.compare_set(_STOP_AT, "", str(stop_at)))


def _gates_key(rank: int) -> str:
    return f"stop/gates/{rank}"


class SignalListener:
    """Hands signals to a `StopAgreement`, also while the main thread is inside a collective.

    The C-level handler writes the signal's number to a socket, and a thread reads it. A second Ctrl-C ends at once, and
    so does a second SIGTERM where nobody hands signals on.

    Args:
        agreement: the ranks' common decision.
        on_request: told the first signal.
        has_agent: whether an agent of ours hands signals on as SIGTERM, and ends its ranks itself where that is meant.
        has_scheduler: whether SIGHUP, SIGUSR1 or SIGUSR2 may be a scheduler's warning; else the handlers that a script
            has for them stay.
    """

    def __init__(
        self,
        agreement: StopAgreement,
        on_request: Callable[[int], None],
        *,
        has_agent: bool = False,
        has_scheduler: bool = False,
    ) -> None:
        self._agreement = agreement
        self._on_request = on_request
        self._has_agent = has_agent
        self._takes_all = has_agent or has_scheduler
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {}
        self._before_fd = -1
        self._first: int | None = None
        self._since = 0.0
        self._closed = False

    @property
    def first(self) -> int | None:
        """The signal that asked this rank to stop, None if none did."""
        return self._first

    @property
    def users_handler(self) -> Callable[[], Any] | None:
        """Calls the handler that the script has for that signal; None if it has none."""
        handler: Any = None if self._first is None else self._before[self._first]
        return partial(handler, self._first, None) if _is_users(handler) else None

    def __enter__(self) -> SignalListener:
        if threading.current_thread() is not threading.main_thread():
            # Python hands signals to the main thread alone, which is somebody else's here.
            self._closed = True
            return self
        # What is ignored stays so: `nohup` ignores the terminal's end, a SLURM job of ours its own warning.
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {
            number: handler
            for number, handler in handlers.items()
            if handler not in (signal.SIG_IGN, None) and not (number in _FOR_SCRIPTS and self._is_left(number, handler))
        }
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.install()
        # A data loader's worker is a fork: its signals are its own, and it must die of them.
        os.register_at_fork(after_in_child=self._leave)
        threading.Thread(target=self._listen, name="launcher-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._closed:
            return
        self._closed = True
        # The handlers first: a signal between the two must not be swallowed.
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()

    def _is_left(self, number: int, handler: Any) -> bool:
        return not self._takes_all and (_is_users(handler) or (handler == signal.SIG_DFL and _is_caught(number)))

    def _leave(self) -> None:
        if not self._closed:
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)

    def install(self) -> None:
        """Take the signals (again: Lightning's own SIGTERM handler starts a collective on one rank alone)."""
        for number in () if self._closed else self._before:
            signal.signal(number, self._wake)

    def _wake(self, signum: int, frame: object) -> None:
        """The socket has the signal's number already; the step that the main thread is in shall be the last."""
        self._agreement.expect()

    def _listen(self) -> None:
        while data := self._reader.recv(16):
            for number in data:
                if number in self._before:
                    self._handle(number)
        self._reader.close()

    def _handle(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._since = number, now
            with suppress(RuntimeError):
                self._agreement.request(number)
            self._on_request(number)
        elif now - self._since > _SECOND_AFTER and self._means_now(number):
            what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nsecond {what}: ending at once\n".encode())
            os._exit(128 + number)

    def _means_now(self, number: int) -> bool:
        """A scheduler sends SIGTERM after its warning (USR1, USR2): that must not cut the saving off."""
        return number == signal.SIGINT or (number == signal.SIGTERM == self._first and not self._has_agent)


def _is_users(handler: Any) -> bool:
    """Whether a script has set this handler, rather than Python, Lightning or the launcher."""
    module = str(getattr(handler, "__module__", None))
    ours = module.partition(".")[0] in ("lightning", "launcher")
    return callable(handler) and handler is not signal.default_int_handler and not ours


def _is_caught(number: int) -> bool:
    """Whether the process catches the signal, by C code such as `faulthandler`'s if Python knows of no handler."""
    with suppress(OSError, StopIteration, ValueError):  # not Linux
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)
    return False
