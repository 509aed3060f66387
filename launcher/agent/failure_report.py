"""Finds the rank that failed first and formats the error report that the user reads. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.error_display import format_failure
from launcher.core.errors import OutOfMemoryError
from launcher.core.event_text import name_stop_reason, signal_name, summarize_error
from launcher.process.heartbeat import BEFORE_TRAINING, NO_STEPS
from launcher.process.parent_death import STOP_SIGNALS
from launcher.process.rank_status import FORK_SERVER_DIED, RankError
from launcher.runs.continuation import Stop

# Signals that a process causes by its own code; other signals come from outside and may not come again.
CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_MAX_OTHER_RANKS = 8


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """How a rank ended, or what it was doing when another rank failed.

    Attributes:
        exit_code: minus the signal's number if a signal ended the rank; None if it was still running.
        time: when the agent saw the rank end, in seconds since the epoch.
        step: optimizer steps done; `BEFORE_TRAINING` before training started.
        last_lines: the last lines of `log`, the rank's output.
        out_of_memory: whether the kernel's out-of-memory killer ended the rank.
        doing: the rank's position in the code, if it was still running.
        hung: whether the other ranks waited for this one in a collective that it did not enter.
        exits: whether exit code 255 is its own.
        last_beat: when the rank last reported that it is alive, in seconds since the epoch; None if never.
    """

    rank: int
    host: str
    exit_code: int | None
    time: float
    step: int = BEFORE_TRAINING
    error: RankError | None = None
    log: str | None = None
    last_lines: tuple[str, ...] = ()
    out_of_memory: bool = False
    doing: str | None = None
    hung: bool = False
    exits: bool = False
    last_beat: float | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the rank hung or ended with an exit code other than 0."""
        return self.hung or self.exit_code not in (0, None)

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed the rank for memory, or one of its allocations failed."""
        allocation_failed = self.error is not None and self.error.kind == OutOfMemoryError.__name__
        return self.out_of_memory or allocation_failed

    @property
    def is_code_unknown(self) -> bool:
        """Whether the exit code is that of a lost fork server."""
        return self.exit_code == FORK_SERVER_DIED and not self.exits

    @property
    def is_consequence(self) -> bool:
        """Whether the rank failed only because it lost the connection to another rank."""
        return self.error is not None and self.error.lost_peer

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal requested that the rank save and stop."""
        return self.error is not None and self.error.interrupted

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankOutcome:
        """The inverse of `dataclasses.asdict`."""
        error = RankError.from_dict(values["error"]) if values["error"] else None
        return cls(**{**values, "error": error, "last_lines": tuple(values["last_lines"])})


def find_first_failure(outcomes: Sequence[RankOutcome]) -> RankOutcome | None:
    """The earliest failure that is not a consequence of another rank's failure; None if no rank failed."""
    failed = [outcome for outcome in outcomes if outcome.has_failed]
    # A hung rank caused the timeouts of the ranks that waited for it.
    return min(
        failed,
        key=lambda each: (each.is_consequence, not each.hung, (each.error or each).time, each.rank),
        default=None,
    )


def has_failed_at_stop(outcomes: Sequence[RankOutcome]) -> bool:
    """Whether a rank has failed after a signal to the agent, by an error that the stop of the others did not cause.

    A scheduler may also send its signal directly to every process of the job.
    """
    expected = {0, *(code for n in (*STOP_SIGNALS, signal.SIGKILL) for code in (128 + n, -n))}
    failed = [outcome for outcome in outcomes if outcome.exit_code not in expected]
    return len(failed) == len(outcomes) or any(not outcome.is_consequence for outcome in failed)


def find_stop(number: int, outcomes: Sequence[RankOutcome], run: Path | None, *, is_second: bool = False) -> Stop:
    """How signal `number` stopped the ranks of a node; `is_second`: a second signal killed them."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None and outcome.error.interrupted]
    saved = next((Path(error.checkpoint) for error in errors if error.checkpoint is not None), None)
    steps = [error.step for error in errors] or [outcome.step for outcome in outcomes]
    return Stop(number, max((0, *steps)), saved, run, at_once=is_second and saved is None)


def name_failure_reason(outcome: RankOutcome) -> str:
    """The `reason` of a `rank_failed` event."""
    error = outcome.error
    if outcome.hung:
        return "hung"
    if outcome.ran_out_of_memory:
        return "out_of_memory"
    if outcome.is_interrupted:
        return name_stop_reason((outcome.exit_code or 0) - 128)
    if error is not None and outcome.exit_code != 0:
        if error.storage is not None:
            return error.storage
        if error.lost_peer:
            return "lost_connection"
        return "usage" if error.explained else "exception"
    if outcome.exit_code is not None and outcome.exit_code < 0:
        return "crashed" if -outcome.exit_code in CRASH_SIGNALS else "killed"
    return "killed" if outcome.is_code_unknown else "exit"


def to_shell_exit_code(exit_code: int) -> int:
    """The exit code as a shell shows it: 128 + N for a process that signal N ended."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def describe_outcome(outcome: RankOutcome) -> str:
    """One line about how a rank ended or what it is doing."""
    at = f" at step {outcome.step}" if outcome.step >= 0 else " before training started"
    if outcome.step == NO_STEPS:
        at = ""
    if outcome.hung:
        return f"hung{at}" + (f": it was {outcome.doing}" if outcome.doing else "")
    if outcome.error is not None and (outcome.exit_code is None or outcome.exit_code > 0):
        if outcome.is_consequence:
            return f"lost the connection to another rank ({outcome.error.kind}){at}"
        return f"{summarize_error(outcome.error.kind, outcome.error.message)}{at}"
    if outcome.exit_code is None:
        return f"running{at}" + (f", {outcome.doing}" if outcome.doing else "")
    if outcome.out_of_memory:
        return f"killed by the kernel because the host ran out of memory (SIGKILL){at}"
    if outcome.exit_code < 0:
        return f"killed by {signal_name(-outcome.exit_code)} (signal {-outcome.exit_code}){at}"
    if outcome.exit_code == 0:
        return f"finished{at}"
    if outcome.is_code_unknown:
        return f"ended{at} with an unknown exit code: the rank or its fork server was killed"
    return f"exited with code {outcome.exit_code}{at}"


def format_failure_report(first: RankOutcome, outcomes: Sequence[RankOutcome], decision: str) -> str:
    """The error report: the rank that failed first, its last lines, the other ranks, and the restart decision."""
    if first.error is not None and first.error.explained:
        return f"error: {first.error.message}" + ("" if first.error.repeats else f"\n  {decision}")
    lines = [f"error: rank {first.rank} ({first.host}) failed first: {describe_outcome(first)}"]
    last_lines = _select_last_lines(first)
    if last_lines:
        lines.append(f"  its last lines ({first.log}):" if first.log else "  its last lines:")
        lines += [f"    | {line}" for line in last_lines]
    others = [outcome for outcome in outcomes if outcome.rank != first.rank]
    lines += [f"  rank {each.rank} ({each.host}): {describe_outcome(each)}" for each in others[:_MAX_OTHER_RANKS]]
    if len(others) > _MAX_OTHER_RANKS:
        lines.append(f"  and {len(others) - _MAX_OTHER_RANKS} more ranks")
    lines.append(f"  {decision}")
    return "\n".join(lines)


def describe_failure(first: RankOutcome, outcomes: Sequence[RankOutcome]) -> str:
    """The report for Python code, which ends with the error of the rank that failed first."""
    others = [f"rank {each.rank} {describe_outcome(each)}" for each in outcomes if each.rank != first.rank]
    details = first.last_lines if first.error is None else first.error.traceback
    return format_failure(f"rank {first.rank} ({first.host}) failed first: {describe_outcome(first)}", others, details)


def _select_last_lines(outcome: RankOutcome) -> Sequence[str]:
    """The end of the log; the exception's traceback if the log does not contain it."""
    if outcome.error is not None and not any(outcome.error.kind in line for line in outcome.last_lines):
        return outcome.error.traceback
    return outcome.last_lines
