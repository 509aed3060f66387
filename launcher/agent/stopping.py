"""The stop of one attempt after a signal to the agent: the ranks get time to save, and the stop is reported once."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection

from launcher.agent.agent_report import AgentReport
from launcher.agent.rank_processes import AttemptProcesses
from launcher.agent.start_request import StartRequest
from launcher.process.heartbeat import BEFORE_TRAINING

# Seconds until the other ranks must have ended after the first one has saved.
SAVE_TIMEOUT = 120.0
# The same if no rank has begun to train: there is nothing to save, and a rank that waits in C code sees no signal.
_UNTRAINED_EXIT_TIMEOUT = 3.0


class AttemptStop:
    """Lets the ranks of an attempt save, and kills those that take too long."""

    def __init__(self, processes: AttemptProcesses, request: StartRequest) -> None:
        self._processes = processes
        self._request = request
        self._deadline: float | None = None

    def supervise(self, number: int) -> None:
        """Check once, while ranks are running, whether their time after signal `number` is over."""
        ranks = self._processes.ranks()
        # Code that does not know the launcher may have lost the signal, or ignore it.
        has_first_ended = any(process.exit_code is not None for process in ranks.values())
        if self._deadline is None and (has_first_ended or self._request.is_plain):
            seconds = self._seconds_to_save(ranks)
            self._deadline = time.monotonic() + seconds
            self._request.report_stop_begin(number, seconds)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._processes.send(signal.SIGKILL)

    def report(self, number: int, *, is_second: bool) -> None:
        """Report how signal `number` stopped the ranks; `is_second`: a second signal killed them."""
        ranks = self._processes.ranks()
        outcomes = self._processes.inspector.collect_outcomes(ranks, {})
        self._request.report_stop(outcomes)
        if not self._request.is_plain:
            run = self._processes.inspector.find_run_directory(ranks)
            AgentReport(run).report_stop(number, outcomes, is_second=is_second)

    def _seconds_to_save(self, ranks: Collection[int]) -> float:
        beats = [self._processes.inspector.read_heartbeat(rank) for rank in ranks]
        is_untrained = all(beat is None or beat.step == BEFORE_TRAINING for beat in beats)
        return _UNTRAINED_EXIT_TIMEOUT if is_untrained and not self._request.is_plain else SAVE_TIMEOUT
