"""From events to a `History`. Pure; takes whatever lies in the file: of a crashed run, an older version, or foreign."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, cast

import numpy as np

from launcher.report.records import Alert, Attempt, Happening, History, Numbers, Outcome, RankTable, Step, Validation
from launcher.report.wording import told_in_words

_RANK_COLUMNS = ("loss_scale", "skipped_steps", "step_seconds", "data_seconds", "own_seconds", "peak_memory")
_FAST_TYPES = {int, float, type(None)}
# A whole number may be too large for a float.
_LARGEST_FAST = 1e300
_NAN = math.nan
# Too many of them for a line each: the plots and tables show them.
_QUIET = frozenset({"step", "ranks", "validation", "checkpoint", "planned", "training_started", "alert"})
# Whole numbers up to here are exact as floats.
_LARGEST_COUNT = 2**53


class _Malformed(Exception):  # noqa: N818 -- never leaves this module
    """An event of a known kind without the fields that it needs."""


def read_history(events: Iterable[Mapping[str, Any]], *, foreign_lines: int = 0) -> History:
    """Sort a run's events into attempts.

    Args:
        events: in the order of the file.
        foreign_lines: lines that were no events at all.
    """
    attempts: list[_Open] = []
    plan: Mapping[str, Any] = {}
    for event in events:
        try:
            time, rank, kind = _number(event.get("time")), int(_number(event.get("rank"))), event["kind"]
            if not isinstance(kind, str):
                raise _Malformed
            if kind == "run_started" or not attempts:
                attempts.append(_Open(Attempt(len(attempts) + 1, time, time)))
            if kind == "planned":
                plan = _mapping(event.get("plan"))
            attempts[-1].take(event, kind, time, rank)
        except (_Malformed, ValueError, OverflowError):
            foreign_lines += 1
    return History(tuple(a.close() for a in attempts), plan, foreign_lines)


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """Intervals with the same ranks, as plain numbers: a long run logs millions, and objects of them take seconds.

    Attributes:
        ranks: of every interval.
        steps: of shape (intervals,).
        values: of shape (intervals, columns, ranks); NaN where there is none.
    """

    ranks: list[int]
    steps: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    values: array[float] = dataclasses.field(default_factory=lambda: array("d"))


class _Open:
    """An attempt while its events are read."""

    def __init__(self, attempt: Attempt) -> None:
        self._known: dict[str, Any] = {}
        self._attempt = attempt
        self._steps: list[Step] = []
        self._rows: list[_Rows] = []
        self._validations: list[Validation] = []
        self._alerts: list[Alert] = []
        self._checkpoints: list[tuple[int, float]] = []
        self._happenings: list[Happening] = []
        self._last = attempt.started
        self._last_step: int | None = None

    def take(self, event: Mapping[str, Any], kind: str, time: float, rank: int) -> None:
        """Add one event."""
        reader = _READERS.get(kind)
        if reader is not None:
            reader(self, event, time, rank)
        self._last = max(self._last, time)
        step = event.get("step")
        if type(step) is int:
            # A rank that was stopped tells the step it stopped at; the last word counts.
            self._last_step = step
        if kind not in _QUIET:
            text = told_in_words(event, kind)
            self._happenings.append(Happening(time, rank, kind, text, step if type(step) is int else None))

    def close(self) -> Attempt:
        """The attempt as a record."""
        return dataclasses.replace(
            self._attempt,
            last_event=self._last,
            end_step=self._last_step,
            steps=tuple(self._steps),
            rank_table=_rank_table(self._rows),
            validations=tuple(self._validations),
            alerts=tuple(self._alerts),
            checkpoints=tuple(self._checkpoints),
            happenings=tuple(self._happenings),
            **self._known,
        )

    def started(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        versions = event.get("versions")
        told = {k: str(v) for k, v in _mapping(versions).items() if v is not None} if versions else {}
        count = event.get("restart_count")
        self._known.update(
            restart_count=count if type(count) is int else 0,
            source=_text(event.get("source")),
            host=_text(event.get("host")),
            versions=told,
        )

    def training_started(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        self._known["start_step"] = _count(event.get("step"))

    def first_step(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del event, rank
        self._known.setdefault("first_step_time", time)

    def step(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        seconds = event.get("seconds_per_step")
        rates = event.get("learning_rate") or []
        self._steps.append(
            Step(
                _count(event.get("step")),
                time,
                None if seconds is None else _number(seconds),
                _metrics(event.get("metrics")),
                tuple(_any_number(rate) for rate in _sequence(rates)),
            )
        )

    def ranks(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        ranks = event.get("ranks")
        if not self._rows or self._rows[-1].ranks != ranks:
            if not isinstance(ranks, list) or not ranks:
                raise _Malformed
            checked = [_count(one) for one in cast("list[Any]", ranks)]
            step, numbers = _count(event.get("step")), _columns(event, len(checked))
            self._rows.append(_Rows(checked))
        else:
            step, numbers = _count(event.get("step")), _columns(event, len(self._rows[-1].ranks))
        self._rows[-1].steps.append(step)
        self._rows[-1].values.extend(numbers)

    def validation(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        self._validations.append(Validation(_count(event.get("step")), time, _metrics(event.get("metrics"))))

    def checkpoint(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        self._checkpoints.append((_count(event.get("step")), time))

    def alert(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        step = event.get("step")
        self._alerts.append(
            Alert(
                step if type(step) is int else None,
                time,
                _text(event.get("alert")),
                _text(event.get("title")),
                _text(event.get("text")),
                tuple(_count(r) for r in _sequence(event.get("ranks") or [])),
            )
        )

    def finished(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        self._known.update(outcome="finished", detail=told_in_words(event, "finished"), failed_rank=None)

    def interrupted(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        self._ended("interrupted", event)

    def failed(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time
        if self._ended("failed", event):
            host = _text(event.get("host"))
            self._known["failed_rank"] = rank
            self._known["detail"] = f"rank {rank}{f' ({host})' if host else ''}: {self._known['detail']}"

    def rank_failed(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        # The agent saw all ranks: its word on who was first counts more than a rank's own.
        if self._known.get("outcome") == "failed":
            del self._known["outcome"]
        self.failed(event, time, rank)

    def _ended(self, outcome: Outcome, event: Mapping[str, Any]) -> bool:
        """The first that is told of an end is its cause; what other ranks say follows from it."""
        if "outcome" in self._known:
            return False
        self._known.update(outcome=outcome, detail=told_in_words(event, outcome))
        return True


_READERS = {
    "run_started": _Open.started,
    "training_started": _Open.training_started,
    "first_step": _Open.first_step,
    "step": _Open.step,
    "ranks": _Open.ranks,
    "validation": _Open.validation,
    "checkpoint": _Open.checkpoint,
    "alert": _Open.alert,
    "finished": _Open.finished,
    "interrupted": _Open.interrupted,
    "preempted": _Open.interrupted,
    "failed": _Open.failed,
    "rank_failed": _Open.rank_failed,
}


def _number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _Malformed
    return float(value)


def _any_number(value: Any) -> float:
    """A number, or the text that `launcher.events` writes for one that is not finite."""
    if type(value) in (int, float):
        return float(value)
    if isinstance(value, str):
        return float(value)  # a ValueError is taken as malformed
    raise _Malformed


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_COUNT:
        raise _Malformed
    return value


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed
    return cast("dict[str, Any]", value)


def _sequence(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Malformed
    return cast("list[Any]", value)


def _metrics(value: Any) -> Mapping[str, float]:
    metrics = _mapping(value)
    if set(map(type, metrics.values())) == {float}:
        return metrics  # as good as all are
    return {name: _any_number(number) for name, number in _mapping(value).items()}


def _columns(event: Mapping[str, Any], ranks: int) -> list[float]:
    """The columns one after the other, a number a rank."""
    columns = [event.get(name) for name in _RANK_COLUMNS]
    if set(map(type, columns)) == {list} and set(map(len, columns)) == {ranks}:  # type: ignore[arg-type] -- all lists
        numbers = list(chain.from_iterable(cast("list[list[Any]]", columns)))
        types = set(map(type, numbers))
        if types <= _FAST_TYPES and max(filter(None, numbers), default=0.0) < _LARGEST_FAST:
            return [_NAN if value is None else value for value in numbers] if type(None) in types else numbers
    return list(chain.from_iterable(_column(column, ranks) for column in columns))


def _column(value: Any, length: int) -> list[float]:
    """One number a rank, NaN where there is none; all NaN if the column is missing."""
    if value is None:
        return [_NAN] * length
    column = _sequence(value)
    if len(column) != length:
        raise _Malformed
    return [_NAN if v is None else _any_number(v) for v in column]


def _rank_table(rows: list[_Rows]) -> RankTable | None:
    """The rows as arrays; a rank that is missing in some has NaN there."""
    if not rows:
        return None
    ranks = sorted({rank for part in rows for rank in part.ranks}) if len(rows) > 1 else rows[0].ranks
    grids = np.concatenate([_spread(part, ranks) for part in rows])
    steps = np.concatenate([np.array(part.steps, dtype=float) for part in rows])
    return RankTable(steps, tuple(ranks), *(grids[:, i] for i in range(len(_RANK_COLUMNS))))


def _spread(part: _Rows, ranks: list[int]) -> Numbers:
    """Shape (intervals, columns, ranks), for these ranks; a rank that is named twice counts as it was named last."""
    own = np.array(part.values, dtype=float).reshape(len(part.steps), len(_RANK_COLUMNS), len(part.ranks))
    if part.ranks == ranks:
        return own
    grid = np.full((*own.shape[:2], len(ranks)), np.nan)
    grid[:, :, [ranks.index(rank) for rank in part.ranks]] = own
    return grid
