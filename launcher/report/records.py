"""A run as frozen records, read from its events."""

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
    """What rank 0 logged at the first step or a logging interval; a tuple, because a long run has 100,000 of them.

    Attributes:
        step: optimizer steps done.
        seconds: mean wall time of an optimizer step in this interval; None if not recorded.
        metrics: what the module logged, including NaN and infinities.
        learning_rates: of the next step, without duplicates; empty if not recorded.
    """

    step: int
    seconds: float | None
    metrics: Mapping[str, float]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RankTable:
    """All ranks at the logging intervals of one attempt; NaN where a value is missing.

    `steps` (optimizer steps done) has shape (intervals,), the other arrays have shape (intervals, ranks).

    Attributes:
        skipped_steps: number of optimizer steps skipped since the training began.
        step_seconds, data_seconds, own_seconds: means of an optimizer step; see `launcher.monitoring.samples`.
    """

    steps: Numbers
    ranks: tuple[int, ...]
    loss_scale: Numbers
    skipped_steps: Numbers
    step_seconds: Numbers
    data_seconds: Numbers
    own_seconds: Numbers

    def column(self, name: str) -> dict[int, Numbers]:
        """One quantity: rank to its values, of shape (intervals,)."""
        grid = getattr(self, name)
        return {rank: grid[:, i] for i, rank in enumerate(self.ranks)}


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """Metrics at the end of a validation, of an epoch or of the training."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AlertRecord:
    """An alert of the monitor; see `launcher.monitoring.health`."""

    step: int | None
    time: float
    kind: str
    title: str
    text: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MeasuredPeaks:
    """Bytes at the end of an attempt: the measured peak of each rank, and those of a rank in the plan, if estimated."""

    measured: Mapping[int, int]
    method: str
    planned: int | None


@dataclass(frozen=True, slots=True)
class EventLine:
    """One event as a line of text; `step` is None if the event has none."""

    time: float
    rank: int
    text: str
    step: int | None = None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One start of all ranks, up to its end or to the next start. Times are seconds since the epoch.

    Attributes:
        number: from 1.
        outcome: 'unknown' if the end was not recorded.
        detail: the end as a sentence.
        failed_rank: the first rank that failed; None if none did.
        exit_code: of the run, as a shell shows it; None if it was not recorded.
        first_step_time: end of the first optimizer step; None if there was none.
        start_step: optimizer steps done before this attempt; None if it did not start to train.
        end_step: optimizer steps done at its end.
        epochs: after each epoch of training; empty if an older version wrote the run.
        last_metrics: after the training; None if it did not finish.
        checkpoints: step and time of each.
        lines: its events as text, without those that the plots and tables show.
    """

    number: int
    started: float
    last_event: float
    outcome: Outcome = "unknown"
    detail: str = ""
    failed_rank: int | None = None
    exit_code: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    first_step_time: float | None = None
    start_step: int | None = None
    end_step: int | None = None
    memory: MeasuredPeaks | None = None
    steps: tuple[Step, ...] = ()
    rank_table: RankTable | None = None
    validations: tuple[MetricsRecord, ...] = ()
    epochs: tuple[MetricsRecord, ...] = ()
    last_metrics: MetricsRecord | None = None
    alerts: tuple[AlertRecord, ...] = ()
    checkpoints: tuple[tuple[int, float], ...] = ()
    lines: tuple[EventLine, ...] = ()

    @property
    def seconds(self) -> float:
        """From its start to its last event."""
        return max(self.last_event - self.started, 0.0)


@dataclass(frozen=True, slots=True)
class History:
    """All attempts of a run in the order of their starts, and the plan of the last one; empty if not recorded.

    `evaluated` has the metrics of `launcher validate` and `launcher test`, by name; the newest of each.
    """

    attempts: tuple[AttemptRecord, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unreadable_lines: int = 0
    evaluated: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def outcome(self) -> Outcome:
        """Outcome of the last attempt."""
        return self.attempts[-1].outcome if self.attempts else "unknown"

    @property
    def last_step(self) -> int:
        """Optimizer steps done by the last attempt that trained; 0 if none did."""
        return next((a.end_step for a in reversed(self.attempts) if a.end_step is not None), 0)

    @property
    def restart_steps(self) -> list[float]:
        """The step that each later attempt started from."""
        return [float(a.start_step) for a in self.attempts[1:] if a.start_step is not None]

    @property
    def rank_tables(self) -> list[RankTable]:
        """The tables of the attempts that have one."""
        return [a.rank_table for a in self.attempts if a.rank_table is not None]

    @property
    def alerts(self) -> tuple[AlertRecord, ...]:
        """The alerts of all attempts."""
        return tuple(alert for attempt in self.attempts for alert in attempt.alerts)

    @property
    def seconds_per_step(self) -> float | None:
        """Median wall time of an optimizer step, in seconds; None if not recorded."""
        recorded = [s.seconds for attempt in self.attempts for s in attempt.steps if s.seconds is not None]
        return statistics.median(recorded) if recorded else None

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the last attempt that recorded them."""
        return next((a.versions for a in reversed(self.attempts) if a.versions), {})

    @property
    def repeated_steps(self) -> dict[int, int]:
        """Number of an attempt to how many of its optimizer steps the next attempt did again."""
        return {
            before.number: before.end_step - after.start_step
            for before, after in itertools.pairwise(self.attempts)
            if before.end_step is not None and after.start_step is not None and before.end_step > after.start_step
        }
