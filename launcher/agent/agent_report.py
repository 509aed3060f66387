"""What the agent of a node writes: lines on the terminal, and events in the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.agent.failure_report import RankOutcome, find_stop, name_failure_reason
from launcher.agent.restart_policy import RestartDecision
from launcher.checkpoint.manifest import remove_partial_checkpoints
from launcher.core.event_text import name_stop_reason
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.wrapping import print_message
from launcher.process.heartbeat import NO_STEPS
from launcher.runs.continuation import describe_command, describe_stop


class AgentReport:
    """Writes for the ranks of one attempt; `run` is their run directory, None if they have not reported one."""

    def __init__(self, run: Path | None) -> None:
        self._run = run

    def report_stop(self, number: int, outcomes: Sequence[RankOutcome], *, is_second: bool) -> None:
        """Print once for all ranks what signal `number` has stopped, and write the event unless a rank has done so.

        `is_second`: a second signal killed the ranks.
        """
        stop = find_stop(number, outcomes, self._run, is_second=is_second)
        if stop.saved is None and not any(outcome.is_interrupted for outcome in outcomes):
            self.write_event(outcomes[0].rank, "interrupted", signal=number, step=stop.step, checkpoint=None,
                             reason=name_stop_reason(number), second=stop.at_once)  # fmt: skip
        if self._run is not None and stop.at_once:
            remove_partial_checkpoints(self._run / "checkpoints")
        print_message(describe_stop(stop))

    def record_failure(self, first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision) -> None:
        """Write the event of the rank that failed first."""
        self.write_event(first.rank, "rank_failed", host=first.host,
                         step=None if first.step == NO_STEPS else first.step,
                         exit_code=first.exit_code, hung=first.hung, out_of_memory=first.out_of_memory,
                         error=None if first.error is None else f"{first.error.kind}: {first.error.message}",
                         last_sign=max((o.last_beat for o in outcomes if o.last_beat is not None), default=None),
                         log=first.log, last_lines=first.last_lines,
                         others=[asdict(outcome) for outcome in outcomes if outcome.rank != first.rank],
                         restart=decision.restart, verdict=decision.reason,
                         reason=name_failure_reason(first))  # fmt: skip

    def print_command(self, first: RankOutcome) -> None:
        """After an error of a disk, print the command that continues the run."""
        if first.error is not None and first.error.storage is not None and (command := describe_command(self._run)):
            print_message(command)

    def write_event(self, rank: int, kind: str, **fields: Any) -> None:
        """Write an event if there is a run directory."""
        if self._run is not None:
            EventLog(self._run / FILE_NAME, rank).write(kind, **json.loads(json.dumps(fields, default=str)))
