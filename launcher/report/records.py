"""What a run's events say, as frozen records."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Outcome = Literal["finished", "failed", "interrupted", "running", "unknown"]


class Step(NamedTuple):
    """Rank zero's account at a logging interval; a tuple, as a long run has 100,000 of them.

    Attributes:
        step: optimizer steps done.
        time: seconds since the epoch.
        seconds: mean wall time of an optimizer step since the account before; None if not told.
        metrics: what the module logged; NaN and infinities as they are.
        learning_rates: of the next step, equal ones once; empty if not told.
    """

    step: int
    time: float
    seconds: float | None
    metrics: Mapping[str, float]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RankTable:
    """All ranks at the logging intervals of one attempt; NaN where a rank told nothing.

    Attributes:
        steps: optimizer steps done, shape (intervals,).
        ranks: global ranks.
        loss_scale: shape (intervals, ranks), as are all that follow.
        skipped_steps: left out since the training began.
        step_seconds, data_seconds, own_seconds: means of an optimizer step; see `launcher.monitoring.samples`.
        peak_memory: bytes.
    """

    steps: Numbers
    ranks: tuple[int, ...]
    loss_scale: Numbers
    skipped_steps: Numbers
    step_seconds: Numbers
    data_seconds: Numbers
    own_seconds: Numbers
    peak_memory: Numbers

    def column(self, name: str) -> dict[int, Numbers]:
        """One quantity as a line for each rank, of shape (intervals,)."""
        grid = getattr(self, name)
        return {rank: grid[:, i] for i, rank in enumerate(self.ranks)}


@dataclass(frozen=True, slots=True)
class ValidationRecord:
    """Metrics after a validation."""

    step: int
    time: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AlertRecord:
    """Something that a person was told to look at; see `launcher.monitoring.health.AlertRecord`."""

    step: int | None
    time: float
    kind: str
    title: str
    text: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryEnd:
    """What the ranks needed, told at the end of an attempt.

    Attributes:
        measured: rank to its peak in bytes.
        method: what was measured, in words.
        planned: bytes that the plan expected of a rank; None if it did not look.
    """

    measured: Mapping[int, int]
    method: str
    planned: int | None


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """A line of the run's history.

    Attributes:
        time: seconds since the epoch.
        rank: who told it.
        kind: the event's.
        text: in plain words.
        step: optimizer steps done; None if not told.
    """

    time: float
    rank: int
    kind: str
    text: str
    step: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One start of the run, to its end or to the next start.

    Attributes:
        number: from 1.
        started: seconds since the epoch.
        last_event: seconds since the epoch.
        outcome: how it ended; 'unknown' if nothing was written of its end.
        detail: the end in plain words.
        failed_rank: the first rank that failed; None if none did.
        restart_count: of the launch that it belongs to.
        source: who made the ranks: 'torchrun', 'slurm', 'nobody'.
        host: rank zero's; empty if not told.
        versions: of the libraries; empty if not told.
        first_step_time: when the first optimizer step was done; None if none was.
        start_step: optimizer steps that were done before it; None if the training never began.
        rank_table: what all ranks told; None if they told nothing.
        memory: what the ranks needed beside what was planned; None if the training did not end.
        steps, validations, alerts: in the order they were told.
        checkpoints: step and time of each.
        happenings: everything that is worth a line.
    """

    number: int
    started: float
    last_event: float
    outcome: Outcome = "unknown"
    detail: str = ""
    failed_rank: int | None = None
    restart_count: int = 0
    source: str = ""
    host: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    first_step_time: float | None = None
    start_step: int | None = None
    end_step: int | None = None
    memory: MemoryEnd | None = None
    steps: tuple[Step, ...] = ()
    rank_table: RankTable | None = None
    validations: tuple[ValidationRecord, ...] = ()
    alerts: tuple[AlertRecord, ...] = ()
    checkpoints: tuple[tuple[int, float], ...] = ()
    happenings: tuple[HistoryLine, ...] = ()

    @property
    def seconds(self) -> float:
        """From its start to the last that was heard of it."""
        return max(self.last_event - self.started, 0.0)


@dataclass(frozen=True, slots=True)
class History:
    """A run, as far as its events tell it.

    Attributes:
        attempts: in the order of their starts.
        plan: the last attempt's, as `plan.json` has it; empty if not told.
        foreign_lines: lines of the events file that could not be read.
    """

    attempts: tuple[AttemptRecord, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict[str, Any])
    foreign_lines: int = 0

    @property
    def outcome(self) -> Outcome:
        """How the last attempt ended."""
        return self.attempts[-1].outcome if self.attempts else "unknown"

    @property
    def last_step(self) -> int:
        """Optimizer steps done by the attempt that came last to train; 0 if none was."""
        return next((a.end_step for a in reversed(self.attempts) if a.end_step is not None), 0)

    @property
    def lost_steps(self) -> int:
        """Optimizer steps that were done again, because a later attempt began before them."""
        return sum(lost_steps(self.attempts).values())

    @property
    def alerts(self) -> tuple[AlertRecord, ...]:
        """Of all attempts."""
        return tuple(alert for attempt in self.attempts for alert in attempt.alerts)

    @property
    def seconds_per_step(self) -> float | None:
        """Median wall time of an optimizer step, in seconds; None if no time was told."""
        told = [s.seconds for attempt in self.attempts for s in attempt.steps if s.seconds is not None]
        return statistics.median(told) if told else None

    @property
    def versions(self) -> Mapping[str, str]:
        """The last attempt's that told any."""
        return next((a.versions for a in reversed(self.attempts) if a.versions), {})


def lost_steps(attempts: tuple[AttemptRecord, ...]) -> dict[int, int]:
    """For each attempt whose work was partly done again: its number and how many optimizer steps."""
    lost: dict[int, int] = {}
    for before, after in itertools.pairwise(attempts):
        if before.end_step is not None and after.start_step is not None and before.end_step > after.start_step:
            lost[before.number] = before.end_step - after.start_step
    return lost
