"""The rank processes of one attempt on this node: their state, waiting for them, and signals to them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import time
from collections.abc import Sequence
from typing import Any

from launcher.agent.rank_inspector import RankInspector, RankProcess


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
        """Wait while the only known failure is a lost connection, or while a rank that has raised is still running."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ranks = self.ranks()
            errors = {rank: self.inspector.read_status(rank).error for rank in ranks}
            running = [rank for rank, process in ranks.items() if process.exit_code is None]
            ending = [rank for rank in running if errors[rank] is not None]
            causes = [rank for rank, process in ranks.items()
                      if process.exit_code and not ((error := errors[rank]) and error.lost_peer)]  # fmt: skip
            if not ending and (causes or not running):
                return
            # A rank reports its exception before it ends, so look again even if no process has ended.
            self.wait_for_next_exit(min(deadline - time.monotonic(), 0.1))

    def wait_for_errors(self, seconds: float) -> None:
        """Wait until each rank has ended or reported its error: most lose their connection to the failed one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(
            process.exit_code is None and self.inspector.read_status(rank).error is None
            for rank, process in self.ranks().items()
        ):
            self.wait_for_next_exit(min(deadline - time.monotonic(), 0.05))

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
