"""The processes of one attempt on this node: how they stand, waiting for them, and signals to them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from launcher.agent.rank_inspector import RankEvidence, RankProcess
from launcher.agent.rank_main import STACKS_SIGNAL


class AttemptProcesses:
    """One attempt.

    Args:
        ranks: global ranks, in the order of their local ranks.
        processes: `multiprocessing`'s, in the same order.
        evidence: reads what the ranks tell.
    """

    def __init__(self, ranks: Sequence[int], processes: Sequence[Any], evidence: RankEvidence) -> None:
        self._processes = dict(zip(ranks, processes, strict=True))
        self._ended: dict[int, float] = {}
        self.evidence = evidence

    def ranks(self) -> dict[int, RankProcess]:
        """How the processes stand now, by global rank."""
        found: dict[int, RankProcess] = {}
        for rank, process in self._processes.items():
            code = process.exitcode
            if code is not None:
                self._ended.setdefault(rank, time.time())
            found[rank] = RankProcess(rank, process.pid, code, self._ended.get(rank, 0.0))
        return found

    def await_one(self, seconds: float) -> None:
        """Wait until the next process ends."""
        running = [process.sentinel for process in self._processes.values() if process.exitcode is None]
        multiprocessing.connection.wait(running, max(0.0, seconds))

    def await_end(self, seconds: float) -> None:
        """Wait until all processes have ended."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and any(process.exit_code is None for process in self.ranks().values()):
            self.await_one(give_up - time.monotonic())

    def await_cause(self, seconds: float) -> None:
        """If all that is known is a lost peer, or a rank has raised and not ended yet, see what else comes."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            ranks = self.ranks()
            errors = {rank: self.evidence.words(rank).error for rank in ranks}
            running = [rank for rank, process in ranks.items() if process.exit_code is None]
            leaving = [rank for rank in running if errors[rank] is not None]
            causes = [rank for rank, process in ranks.items()
                      if process.exit_code and not ((error := errors[rank]) and error.lost_peer)]  # fmt: skip
            if not leaving and (causes or not running):
                return
            # A rank may also write what it raised without ending yet.
            self.await_one(min(give_up - time.monotonic(), 0.1))

    def send(self, number: int) -> bool:
        """Send a signal to all that still run; False if none does. Signal handlers call it: it asks no state."""
        running = [process.pid for rank, process in self._processes.items() if rank not in self._ended]
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(running)

    def kill(self) -> None:
        """End all at once."""
        self.send(signal.SIGKILL)


def ask_for_stacks(pid: int) -> None:
    """Have a rank write its stacks; nothing if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACKS_SIGNAL)
