"""What the agent writes to the terminal and to the run's events."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.agent.failure_report import RankOutcome, find_stop, name_failure_reason
from launcher.agent.restart_policy import RestartDecision
from launcher.checkpoint.manifest import remove_partial_checkpoints
from launcher.core.event_text import name_stop_reason
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.wrapping import wrap_for
from launcher.process.heartbeat import NO_STEPS
from launcher.runs.continuation import describe_stop


def print_line(text: str) -> None:
    """Write to the terminal; a closed terminal must not end the agent before its ranks."""
    with contextlib.suppress(OSError):
        sys.stderr.write(wrap_for(sys.stderr, text) + "\n")
        sys.stderr.flush()


class AgentEvents:
    """Events about a rank; without a run directory nothing is written."""

    def __init__(self, run: Path | None, rank: int) -> None:
        self._log = None if run is None else EventLog(run / FILE_NAME, rank)

    def write(self, kind: str, **fields: Any) -> None:
        """Write one event; values that JSON does not have become text."""
        if self._log is not None:
            self._log.write(kind, **json.loads(json.dumps(fields, default=str)))


def write_failure(
    run: Path | None, first: RankOutcome, outcomes: Sequence[RankOutcome], decision: RestartDecision
) -> None:
    """Write the event about the first failure of an attempt."""
    AgentEvents(run, first.rank).write(
        "rank_failed", host=first.host, step=None if first.step == NO_STEPS else first.step,
        exit_code=first.exit_code, hung=first.hung, out_of_memory=first.out_of_memory,
        error=None if first.error is None else f"{first.error.kind}: {first.error.message}",
        log=first.log, last_lines=first.last_lines,
        others=[asdict(outcome) for outcome in outcomes if outcome.rank != first.rank],
        restart=decision.restart, verdict=decision.reason, reason=name_failure_reason(first))  # fmt: skip


def report_stop(run: Path | None, number: int, outcomes: Sequence[RankOutcome], *, is_second: bool) -> None:
    """Print once for all ranks what a signal has stopped, and write the event unless the ranks have done so."""
    stop = find_stop(number, outcomes, run, is_second=is_second)
    if stop.saved is None and not any(outcome.is_interrupted for outcome in outcomes):
        AgentEvents(run, outcomes[0].rank).write(
            "interrupted", signal=number, step=stop.step, checkpoint=None, reason=name_stop_reason(number),
            second=stop.at_once)  # fmt: skip
    if run is not None and stop.at_once:
        remove_partial_checkpoints(run / "checkpoints")
    print_line(describe_stop(stop))
