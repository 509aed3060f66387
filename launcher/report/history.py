"""Turns events into a `History`. Pure; the events may be of a crashed run, of an older version, or damaged."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from launcher.core.event_text import as_text, describe_event
from launcher.jobs.steps import StepReader
from launcher.report.records import (
    AlertRecord,
    AttemptRecord,
    EventLine,
    History,
    MeasuredPeaks,
    MetricsRecord,
    Numbers,
    Outcome,
    RankTable,
    Step,
)

# Plots and tables show these; there are too many for a line each.
_WITHOUT_LINE = frozenset(
    {
        "step",
        "ranks",
        "validation",
        "epoch",
        "checkpoint",
        "planned",
        "training_started",
        "alert",
        "memory",
        "time_spent",
    }
)
_RANK_COLUMNS = ("loss_scale", "skipped_steps", "step_seconds", "data_seconds", "own_seconds")
# Written between attempts, or after the training: they do not make the attempt before them longer.
_BETWEEN_ATTEMPTS = frozenset({"nodes_missing", "evaluated"})
_ENDS: Mapping[str, Outcome] = {"interrupted": "interrupted", "preempted": "interrupted", "failed": "failed",
                                "out_of_memory": "failed", "rank_failed": "failed"}  # fmt: skip

# Integers up to here are exact as floats.
_LARGEST_COUNT = 2**53
_Kind = TypeVar("_Kind")
# Optimizer steps done at an interval, its global ranks, and their values: shape (columns, ranks), NaN if missing.
_RankInterval = tuple[int, list[int], Numbers]


def read_history(events: Iterable[Mapping[str, Any]]) -> History:
    """Sort a run's events, in the order of the file, into attempts."""
    attempts: list[_AttemptReader] = []
    plan: Mapping[str, Any] = {}
    evaluated: dict[str, float] = {}
    unreadable_lines = 0
    for event in events:
        try:
            time, rank, kind = _as_number(event.get("time")), int(_as_number(event.get("rank"))), event["kind"]
            if not isinstance(kind, str):
                raise ValueError(kind)
            if kind == "run_started" or not attempts:
                attempts.append(_AttemptReader(len(attempts) + 1, time))
            if kind == "planned":
                plan = _as_type(event.get("plan"), dict)
            if kind == "evaluated":
                evaluated.update(_read_evaluated(event))
            attempts[-1].add(event, kind, time, rank)
        except (ValueError, OverflowError):
            unreadable_lines += 1
    return History(tuple(a.finish() for a in attempts), plan, unreadable_lines, evaluated)


class _AttemptReader:
    """Collects the events of one attempt."""

    def __init__(self, number: int, started: float) -> None:
        self._attempt = AttemptRecord(number, started, started)
        self._known: dict[str, Any] = {}
        self._steps: list[Step] = []
        self._intervals: list[_RankInterval] = []
        self._validations: list[MetricsRecord] = []
        self._epochs: list[MetricsRecord] = []
        self._alerts: list[AlertRecord] = []
        self._checkpoints: list[tuple[int, float]] = []
        self._lines: list[EventLine] = []
        self._last_event = started
        self._done = StepReader()

    def add(self, event: Mapping[str, Any], kind: str, time: float, rank: int) -> None:
        """Add one event; raises `ValueError` if a field is missing or has another type."""
        if kind == "step":
            self._add_step(event)
        elif kind == "ranks":
            self._add_ranks(event)
        elif kind == "validation":
            self._validations.append(_read_metrics(event))
        elif kind == "epoch":
            self._epochs.append(_read_metrics(event))
        elif kind == "checkpoint":
            self._checkpoints.append((_as_count(event.get("step")), time))
        elif kind == "alert":
            self._add_alert(event, time)
        elif kind == "memory":
            self._add_memory(event)
        elif kind == "run_started":
            versions = _as_type(event.get("versions") or {}, dict)
            self._known["versions"] = {k: str(v) for k, v in versions.items() if v is not None}
        elif kind == "training_started":
            self._known["start_step"] = _as_count(event.get("step"))
        elif kind == "first_step":
            self._known.setdefault("first_step_time", time)
            # Older versions recorded no metrics at the first step.
            if event.get("metrics") or event.get("learning_rate"):
                self._add_step(event)
        elif kind == "finished":
            self._known.update(outcome="finished", detail=describe_event(event, kind), failed_rank=None,
                               exit_code=0)  # fmt: skip
            if event.get("metrics"):
                self._known["last_metrics"] = _read_metrics(event)
        elif kind in _ENDS:
            self._add_end(event, kind, rank)
        if kind not in _BETWEEN_ATTEMPTS:
            self._last_event = max(self._last_event, time)
        self._done.add(event)
        if kind not in _WITHOUT_LINE:
            step = event.get("step")
            step = step if type(step) is int and step >= 0 else None
            self._lines.append(EventLine(time, rank, describe_event(event, kind), step))

    def finish(self) -> AttemptRecord:
        """The attempt as a record."""
        return dataclasses.replace(
            self._attempt,
            last_event=self._last_event,
            end_step=self._done.step,
            steps=tuple(self._steps),
            rank_table=_make_rank_table(self._intervals),
            validations=tuple(self._validations),
            epochs=tuple(self._epochs),
            alerts=tuple(self._alerts),
            checkpoints=tuple(self._checkpoints),
            lines=tuple(self._lines),
            **self._known,
        )

    def _add_step(self, event: Mapping[str, Any]) -> None:
        seconds = event.get("seconds_per_step")
        seconds = None if seconds is None else _as_number(seconds)
        rates = tuple(_as_any_number(rate) for rate in _as_type(event.get("learning_rate") or [], list))
        self._steps.append(Step(_as_count(event.get("step")), seconds, _as_metrics(event.get("metrics")), rates))

    def _add_ranks(self, event: Mapping[str, Any]) -> None:
        ranks = event.get("ranks")
        # A long run has 100,000 intervals, almost all with the same ranks: these are checked once.
        if self._intervals and self._intervals[-1][1] == ranks:
            ranks = self._intervals[-1][1]
        elif not (ranks := [_as_count(rank) for rank in _as_type(ranks, list)]):
            raise ValueError("no rank")
        self._intervals.append((_as_count(event.get("step")), ranks, _read_rank_grid(event, len(ranks))))

    def _add_alert(self, event: Mapping[str, Any], time: float) -> None:
        step = event.get("step")
        kind, title, text = (as_text(event.get(name)) for name in ("alert", "title", "text"))
        ranks = tuple(_as_count(rank) for rank in _as_type(event.get("ranks") or [], list))
        self._alerts.append(AlertRecord(step if type(step) is int else None, time, kind, title, text, ranks))

    def _add_memory(self, event: Mapping[str, Any]) -> None:
        ranks, peaks = _as_type(event.get("ranks"), list), _as_type(event.get("measured"), list)
        total = _as_type(event.get("planned") or {}, dict).get("total")
        self._known["memory"] = MeasuredPeaks(
            {_as_count(rank): _as_count(peak) for rank, peak in zip(ranks, peaks, strict=True)},
            as_text(event.get("measured_by")),
            None if total is None else _as_count(total),
        )

    def _add_end(self, event: Mapping[str, Any], kind: str, rank: int) -> None:
        """The first reported end is the cause: the failures of other ranks follow from it."""
        outcome = self._known.get("outcome")
        # The agent saw all ranks: its report of the first failed rank replaces what a rank reported.
        if outcome is not None and not (kind == "rank_failed" and outcome in ("failed", "finished")):
            return
        self._known["outcome"] = _ENDS[kind]
        self._known["exit_code"] = _read_exit_code(event)
        if _ENDS[kind] == "interrupted":
            self._known["detail"] = describe_event(event, "interrupted")
            return
        is_oom = kind == "out_of_memory"
        error = f"out of memory with {as_text(event.get('strategy'))}" if is_oom else describe_event(event, "failed")
        host = as_text(event.get("host"))
        self._known.update(failed_rank=rank, detail=f"rank {rank}{f' ({host})' if host else ''}: {error}")


def _read_exit_code(event: Mapping[str, Any]) -> int | None:
    """128 + N for an end by signal N."""
    code, number = event.get("exit_code"), event.get("signal")
    if type(code) is int:
        return code if code >= 0 else 128 - code
    return 128 + number if type(number) is int else None


def _read_rank_grid(event: Mapping[str, Any], ranks: int) -> Numbers:
    """The values of one interval, shape (columns, ranks); a missing column is NaN.

    Raises:
        ValueError: a column has another length, or a value is not a number.
    """
    columns = [[None] * ranks if (column := event.get(name)) is None else column for name in _RANK_COLUMNS]
    try:
        # None becomes NaN, and so does the text that `launcher.core.events` writes for it.
        grid = np.array(columns, dtype=float)
    except TypeError as error:
        raise ValueError(columns) from error
    if grid.shape != (len(_RANK_COLUMNS), ranks):
        raise ValueError(grid.shape)
    return grid


def _make_rank_table(intervals: list[_RankInterval]) -> RankTable | None:
    """All intervals in one table; NaN where a rank is missing in an interval."""
    if not intervals:
        return None
    ranks = sorted({rank for _, own, _ in intervals for rank in own})
    steps = np.array([step for step, _, _ in intervals], dtype=float)
    grids = np.full((len(steps), len(_RANK_COLUMNS), len(ranks)), np.nan)
    first = 0
    for own, group in itertools.groupby(intervals, lambda interval: interval[1]):
        part = np.stack([grid for _, _, grid in group])
        grids[first : first + len(part), :, [ranks.index(rank) for rank in own]] = part
        first += len(part)
    return RankTable(steps, tuple(ranks), *(grids[:, i] for i in range(len(_RANK_COLUMNS))))


def _read_metrics(event: Mapping[str, Any]) -> MetricsRecord:
    return MetricsRecord(_as_count(event.get("step")), _as_metrics(event.get("metrics")))


def _read_evaluated(event: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of `launcher validate` or `launcher test`, which are a list with one entry for each data loader."""
    found = event.get("metrics")
    parts = found if isinstance(found, list) else [found]
    return {name: value for part in parts for name, value in _as_metrics(part or {}).items()}


def _as_number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _as_any_number(value: Any) -> float:
    """A number, or the text that `launcher.core.events` writes for one that is not finite."""
    if type(value) not in (int, float, str):
        raise ValueError(value)
    return float(value)


def _as_count(value: Any) -> int:
    """An integer of at least 0 that a float represents exactly."""
    if type(value) is not int or not 0 <= value < _LARGEST_COUNT:
        raise ValueError(value)
    return value


def _as_type(value: Any, kind: type[_Kind]) -> _Kind:
    """A value of this type: `dict` for a JSON object, `list` for a JSON list."""
    if not isinstance(value, kind):
        raise ValueError(value)
    return value


def _as_metrics(value: Any) -> Mapping[str, float]:
    """Name to number."""
    metrics: dict[str, Any] = _as_type(value, dict)
    if set(map(type, metrics.values())) == {float}:
        return metrics  # the common case
    return {name: _as_any_number(number) for name, number in metrics.items()}
