"""The rank processes of one attempt on this node: their state, waiting for them, and signals to them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.agent.rank_inspector import RankInspector, RankProcess
from launcher.process.rank_status import RankError

# Seconds between two looks at the reports of ranks that are about to report an error.
_REPORT_INTERVAL = 0.002


@dataclass(frozen=True, slots=True)
class RankEnding:
    """How a rank ends so far; `exit_code` is None while it runs, `error` what it has reported."""

    exit_code: int | None
    error: RankError | None = None


Endings = Mapping[int, RankEnding]


def find_possible_causes(endings: Endings) -> list[int]:
    """The running ranks that may turn out to have failed first.

    Not a rank that has reported a lost connection: it is a consequence, however it ends. If a rank has ended by a
    signal or its own error, only another error may be an earlier one.
    """
    others = [rank for rank, ending in endings.items() if ending.exit_code is None and not _has_lost_peer(ending)]
    if any(ending.exit_code and not _has_lost_peer(ending) for ending in endings.values()):
        return [rank for rank in others if endings[rank].error is not None]
    return others


def find_silent(endings: Endings) -> list[int]:
    """The running ranks that have reported no error."""
    return [rank for rank, ending in endings.items() if ending.exit_code is None and ending.error is None]


def _has_lost_peer(ending: RankEnding) -> bool:
    return ending.error is not None and ending.error.lost_peer


class AttemptProcesses:
    """The processes of one attempt: `processes` of `multiprocessing` for the global `ranks`, in the same order."""

    def __init__(self, ranks: Sequence[int], processes: Sequence[Any], inspector: RankInspector) -> None:
        self._processes = dict(zip(ranks, processes, strict=True))
        self._ended: dict[int, float] = {}
        self.inspector = inspector

    def ranks(self) -> dict[int, RankProcess]:
        """Current state of the processes, by global rank."""
        found: dict[int, RankProcess] = {}
        for rank, process in self._processes.items():
            code = process.exitcode
            if code is not None:
                self._ended.setdefault(rank, time.time())
            found[rank] = RankProcess(process.pid, code, self._ended.get(rank, 0.0))
        return found

    def wait_for_next_exit(self, seconds: float) -> None:
        """Wait until the next process ends."""
        running = [process.sentinel for process in self._processes.values() if process.exitcode is None]
        multiprocessing.connection.wait(running, max(0.0, seconds))

    def wait_for_all(self, seconds: float) -> None:
        """Wait until all processes have ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.exit_code is None for process in self.ranks().values()):
            self.wait_for_next_exit(deadline - time.monotonic())

    def wait_for_cause(self, seconds: float) -> None:
        """Wait until it is known which rank failed first on this node; see `find_possible_causes`."""
        self._wait_while(find_possible_causes, seconds)

    def wait_for_errors(self, seconds: float) -> None:
        """Wait until each rank has ended or reported its error: most lose their connection to the failed one."""
        self._wait_while(find_silent, seconds)

    def _wait_while(self, find_awaited: Callable[[Endings], Collection[int]], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        endings: dict[int, RankEnding] = {}
        while True:
            for rank, process in self.ranks().items():
                # Only the first error is kept, so one that was read does not change.
                error = known.error if (known := endings.get(rank)) else None
                endings[rank] = RankEnding(process.exit_code, error or self.inspector.read_status(rank).error)
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not find_awaited(endings):
                return
            # A rank reports its error before it ends, so look again even if no process has ended.
            self.wait_for_next_exit(min(remaining, _REPORT_INTERVAL))

    def wait_for_kept(self, seconds: float) -> None:
        """Wait while a running rank saves the state of its last step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            process.exit_code is None and self.inspector.read_status(rank).keeping
            for rank, process in self.ranks().items()
        ):
            self.wait_for_next_exit(min(deadline - time.monotonic(), 0.005))

    def find_reasons_not_kept(self) -> dict[int, str]:
        """Why ranks could not save the state of their last step, by rank."""
        reasons = {rank: self.inspector.read_status(rank).not_kept for rank in self.ranks()}
        return {rank: reason for rank, reason in reasons.items() if reason}

    def has_exited_by_itself(self) -> bool:
        """Whether a rank has ended with an error code, without an exception or a signal."""
        codes = {rank: process.exit_code or 0 for rank, process in self.ranks().items()}
        return any(code > 0 and self.inspector.read_status(rank).error is None for rank, code in codes.items())

    def send(self, number: int) -> bool:
        """Send a signal to all running ranks; False if there are none. For signal handlers: reads no process state."""
        running = [process.pid for rank, process in self._processes.items() if rank not in self._ended]
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(running)
