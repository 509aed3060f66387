"""Turns events into a `History`. Pure; the events may be of a crashed run, of an older version, or damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from launcher.core.event_text import describe_event
from launcher.report.event_fields import (
    Malformed,
    as_any_number,
    as_count,
    as_metrics,
    as_number,
    as_text,
    as_type,
)
from launcher.report.records import (
    AlertRecord,
    AttemptRecord,
    EventLine,
    History,
    Numbers,
    Outcome,
    PeakMemory,
    RankTable,
    Step,
    ValidationRecord,
)

# Plots and tables show these; there are too many for a line each.
_WITHOUT_LINE = frozenset(
    {"step", "ranks", "validation", "checkpoint", "planned", "training_started", "alert", "memory"}
)
_RANK_COLUMNS = ("loss_scale", "skipped_steps", "step_seconds", "data_seconds", "own_seconds", "peak_memory")
# Written between attempts: they do not make the attempt before them longer.
_BETWEEN_ATTEMPTS = frozenset({"nodes_missing"})
_ENDS: Mapping[str, Outcome] = {"interrupted": "interrupted", "preempted": "interrupted", "failed": "failed",
                                "out_of_memory": "failed", "rank_failed": "failed"}  # fmt: skip


def read_history(events: Iterable[Mapping[str, Any]]) -> History:
    """Sort a run's events, in the order of the file, into attempts."""
    attempts: list[_AttemptReader] = []
    plan: Mapping[str, Any] = {}
    unreadable_lines = 0
    for event in events:
        try:
            time, rank, kind = as_number(event.get("time")), int(as_number(event.get("rank"))), event["kind"]
            if not isinstance(kind, str):
                raise Malformed
            if kind == "run_started" or not attempts:
                attempts.append(_AttemptReader(len(attempts) + 1, time))
            if kind == "planned":
                plan = as_type(event.get("plan"), dict)
            attempts[-1].add(event, kind, time, rank)
        except (Malformed, ValueError, OverflowError):
            unreadable_lines += 1
    return History(tuple(a.finish() for a in attempts), plan, unreadable_lines)


class _AttemptReader:
    """Collects the events of one attempt."""

    def __init__(self, number: int, started: float) -> None:
        self._attempt = AttemptRecord(number, started, started)
        self._known: dict[str, Any] = {}
        self._steps: list[Step] = []
        self._rows: list[_RankRows] = []
        self._validations: list[ValidationRecord] = []
        self._alerts: list[AlertRecord] = []
        self._checkpoints: list[tuple[int, float]] = []
        self._lines: list[EventLine] = []
        self._last_event = started
        self._last_step: int | None = None

    def add(self, event: Mapping[str, Any], kind: str, time: float, rank: int) -> None:
        """Add one event; raises `Malformed` if a field is missing or has another type."""
        if kind == "step":
            self._add_step(event)
        elif kind == "ranks":
            self._add_ranks(event)
        elif kind == "validation":
            metrics = as_metrics(event.get("metrics"))
            self._validations.append(ValidationRecord(as_count(event.get("step")), metrics))
        elif kind == "checkpoint":
            self._checkpoints.append((as_count(event.get("step")), time))
        elif kind == "alert":
            self._add_alert(event, time)
        elif kind == "memory":
            self._add_memory(event)
        elif kind == "run_started":
            versions = as_type(event.get("versions") or {}, dict)
            self._known["versions"] = {k: str(v) for k, v in versions.items() if v is not None}
        elif kind == "training_started":
            self._known["start_step"] = as_count(event.get("step"))
        elif kind == "first_step":
            self._known.setdefault("first_step_time", time)
        elif kind == "finished":
            self._known.update(outcome="finished", detail=describe_event(event, kind), failed_rank=None)
        elif kind in _ENDS:
            self._add_end(event, kind, rank)
        if kind not in _BETWEEN_ATTEMPTS:
            self._last_event = max(self._last_event, time)
        step = event.get("step")
        if type(step) is not int:
            step = None
        else:
            # An interrupted rank records the step that it stopped at, so the last event counts.
            self._last_step = step
        if kind not in _WITHOUT_LINE:
            self._lines.append(EventLine(time, rank, describe_event(event, kind), step))

    def finish(self) -> AttemptRecord:
        """The attempt as a record."""
        return dataclasses.replace(
            self._attempt,
            last_event=self._last_event,
            end_step=self._last_step,
            steps=tuple(self._steps),
            rank_table=_make_rank_table(self._rows),
            validations=tuple(self._validations),
            alerts=tuple(self._alerts),
            checkpoints=tuple(self._checkpoints),
            lines=tuple(self._lines),
            **self._known,
        )

    def _add_step(self, event: Mapping[str, Any]) -> None:
        seconds, rates = event.get("seconds_per_step"), event.get("learning_rate") or []
        self._steps.append(
            Step(
                as_count(event.get("step")),
                None if seconds is None else as_number(seconds),
                as_metrics(event.get("metrics")),
                tuple(as_any_number(rate) for rate in as_type(rates, list)),
            )
        )

    def _add_ranks(self, event: Mapping[str, Any]) -> None:
        ranks = event.get("ranks")
        rows = self._rows[-1] if self._rows and self._rows[-1].ranks == ranks else None
        if rows is None:
            if not isinstance(ranks, list) or not ranks:
                raise Malformed
            rows = _RankRows([as_count(one) for one in cast("list[Any]", ranks)])
        step, grid = as_count(event.get("step")), _read_rank_grid(event, len(rows.ranks))
        if not self._rows or self._rows[-1] is not rows:
            self._rows.append(rows)
        rows.steps.append(step)
        rows.grids.append(grid)

    def _add_alert(self, event: Mapping[str, Any], time: float) -> None:
        step = event.get("step")
        kind, title, text = (as_text(event.get(name)) for name in ("alert", "title", "text"))
        ranks = tuple(as_count(rank) for rank in as_type(event.get("ranks") or [], list))
        self._alerts.append(AlertRecord(step if type(step) is int else None, time, kind, title, text, ranks))

    def _add_memory(self, event: Mapping[str, Any]) -> None:
        ranks, peaks = as_type(event.get("ranks"), list), as_type(event.get("measured"), list)
        total = as_type(event.get("planned") or {}, dict).get("total")
        self._known["memory"] = PeakMemory(
            {as_count(rank): as_count(peak) for rank, peak in zip(ranks, peaks, strict=True)},
            as_text(event.get("measured_by")),
            None if total is None else as_count(total),
        )

    def _add_end(self, event: Mapping[str, Any], kind: str, rank: int) -> None:
        """The first reported end is the cause: the failures of other ranks follow from it."""
        outcome = self._known.get("outcome")
        # The agent saw all ranks: its report of the first failed rank replaces what a rank reported.
        if outcome is not None and not (kind == "rank_failed" and outcome == "failed"):
            return
        self._known["outcome"] = _ENDS[kind]
        if _ENDS[kind] == "interrupted":
            self._known["detail"] = describe_event(event, "interrupted")
            return
        is_oom = kind == "out_of_memory"
        error = f"out of memory with {as_text(event.get('strategy'))}" if is_oom else describe_event(event, "failed")
        host = as_text(event.get("host"))
        self._known.update(failed_rank=rank, detail=f"rank {rank}{f' ({host})' if host else ''}: {error}")


@dataclasses.dataclass(frozen=True, slots=True)
class _RankRows:
    """Consecutive intervals with the same ranks; each grid has shape (columns, ranks), and NaN for a missing value."""

    ranks: list[int]
    steps: list[int] = dataclasses.field(default_factory=list[int])
    grids: list[Numbers] = dataclasses.field(default_factory=list[Numbers])


def _read_rank_grid(event: Mapping[str, Any], ranks: int) -> Numbers:
    """The values of one interval, shape (columns, ranks); a missing column is NaN.

    Raises:
        Malformed: a column has another length, or a value is not a number.
    """
    columns = [[None] * ranks if (column := event.get(name)) is None else column for name in _RANK_COLUMNS]
    try:
        # None becomes NaN, and so does the text that `launcher.core.events` writes for it.
        grid = np.array(columns, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise Malformed from error
    if grid.shape != (len(_RANK_COLUMNS), ranks):
        raise Malformed
    return grid


def _make_rank_table(rows: list[_RankRows]) -> RankTable | None:
    """All intervals in one table; NaN where a rank is missing in an interval."""
    if not rows:
        return None
    ranks = sorted({rank for part in rows for rank in part.ranks})
    steps = np.array([step for part in rows for step in part.steps], dtype=float)
    grids = np.full((len(steps), len(_RANK_COLUMNS), len(ranks)), np.nan)
    first = 0
    for part in rows:
        last = first + len(part.steps)
        grids[first:last, :, [ranks.index(rank) for rank in part.ranks]] = np.stack(part.grids)
        first = last
    return RankTable(steps, tuple(ranks), *(grids[:, i] for i in range(len(_RANK_COLUMNS))))
