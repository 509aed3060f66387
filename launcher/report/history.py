"""From events to a `History`. Pure; takes whatever lies in the file: of a crashed run, an older version, or foreign."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

from launcher.core.event_text import describe_event
from launcher.report.event_fields import (
    Malformed,
    as_any_number,
    as_count,
    as_mapping,
    as_metrics,
    as_number,
    as_sequence,
    as_text,
)
from launcher.report.rank_rows import RankRows, rank_columns, rank_table
from launcher.report.records import (
    AlertRecord,
    AttemptRecord,
    History,
    HistoryLine,
    MemoryEnd,
    Outcome,
    Step,
    ValidationRecord,
)

# Too many of them for a line each: the plots and tables show them.
_QUIET = frozenset({"step", "ranks", "validation", "checkpoint", "planned", "training_started", "alert", "memory"})


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
            time, rank, kind = as_number(event.get("time")), int(as_number(event.get("rank"))), event["kind"]
            if not isinstance(kind, str):
                raise Malformed
            if kind == "run_started" or not attempts:
                attempts.append(_Open(AttemptRecord(len(attempts) + 1, time, time)))
            if kind == "planned":
                plan = as_mapping(event.get("plan"))
            attempts[-1].take(event, kind, time, rank)
        except (Malformed, ValueError, OverflowError):
            foreign_lines += 1
    return History(tuple(a.close() for a in attempts), plan, foreign_lines)


class _Open:
    """An attempt while its events are read."""

    def __init__(self, attempt: AttemptRecord) -> None:
        self._known: dict[str, Any] = {}
        self._attempt = attempt
        self._steps: list[Step] = []
        self._rows: list[RankRows] = []
        self._validations: list[ValidationRecord] = []
        self._alerts: list[AlertRecord] = []
        self._checkpoints: list[tuple[int, float]] = []
        self._happenings: list[HistoryLine] = []
        self._last = attempt.started
        self._last_step: int | None = None

    def take(self, event: Mapping[str, Any], kind: str, time: float, rank: int) -> None:
        """Add one event."""
        reader = _READERS.get(kind)
        if reader is not None:
            reader(self, event, time, rank)
        if kind not in _BETWEEN_ATTEMPTS:
            self._last = max(self._last, time)
        step = event.get("step")
        if type(step) is int:
            # A rank that was stopped tells the step it stopped at; the last word counts.
            self._last_step = step
        if kind not in _QUIET:
            text = describe_event(event, kind)
            self._happenings.append(HistoryLine(time, rank, kind, text, step if type(step) is int else None))

    def close(self) -> AttemptRecord:
        """The attempt as a record."""
        return dataclasses.replace(
            self._attempt,
            last_event=self._last,
            end_step=self._last_step,
            steps=tuple(self._steps),
            rank_table=rank_table(self._rows),
            validations=tuple(self._validations),
            alerts=tuple(self._alerts),
            checkpoints=tuple(self._checkpoints),
            happenings=tuple(self._happenings),
            **self._known,
        )

    def started(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        versions = event.get("versions")
        told = {k: str(v) for k, v in as_mapping(versions).items() if v is not None} if versions else {}
        count = event.get("restart_count")
        self._known.update(
            restart_count=count if type(count) is int else 0,
            source=as_text(event.get("source")),
            host=as_text(event.get("host")),
            versions=told,
        )

    def training_started(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        self._known["start_step"] = as_count(event.get("step"))

    def first_step(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del event, rank
        self._known.setdefault("first_step_time", time)

    def step(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        seconds = event.get("seconds_per_step")
        rates = event.get("learning_rate") or []
        self._steps.append(
            Step(
                as_count(event.get("step")),
                time,
                None if seconds is None else as_number(seconds),
                as_metrics(event.get("metrics")),
                tuple(as_any_number(rate) for rate in as_sequence(rates)),
            )
        )

    def ranks(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        ranks = event.get("ranks")
        if not self._rows or self._rows[-1].ranks != ranks:
            if not isinstance(ranks, list) or not ranks:
                raise Malformed
            checked = [as_count(one) for one in cast("list[Any]", ranks)]
            step, numbers = as_count(event.get("step")), rank_columns(event, len(checked))
            self._rows.append(RankRows(checked))
        else:
            step, numbers = as_count(event.get("step")), rank_columns(event, len(self._rows[-1].ranks))
        self._rows[-1].steps.append(step)
        self._rows[-1].values.extend(numbers)

    def validation(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        self._validations.append(ValidationRecord(as_count(event.get("step")), time, as_metrics(event.get("metrics"))))

    def checkpoint(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        self._checkpoints.append((as_count(event.get("step")), time))

    def alert(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del rank
        step = event.get("step")
        self._alerts.append(
            AlertRecord(
                step if type(step) is int else None,
                time,
                as_text(event.get("alert")),
                as_text(event.get("title")),
                as_text(event.get("text")),
                tuple(as_count(r) for r in as_sequence(event.get("ranks") or [])),
            )
        )

    def memory(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        ranks, peaks = as_sequence(event.get("ranks")), as_sequence(event.get("measured"))
        planned = as_mapping(event.get("planned") or {})
        total = planned.get("total")
        self._known["memory"] = MemoryEnd(
            {as_count(r): as_count(p) for r, p in zip(ranks, peaks, strict=True)},
            as_text(event.get("measured_by")),
            None if total is None else as_count(total),
        )

    def finished(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        self._known.update(outcome="finished", detail=describe_event(event, "finished"), failed_rank=None)

    def interrupted(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time, rank
        self._ended("interrupted", event)

    def failed(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        del time
        if self._ended("failed", event):
            host = as_text(event.get("host"))
            self._known["failed_rank"] = rank
            self._known["detail"] = f"rank {rank}{f' ({host})' if host else ''}: {self._known['detail']}"

    def out_of_memory(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        error = f"out of memory with {as_text(event.get('strategy'))}"
        self.failed({"host": event.get("host"), "error": error}, time, rank)

    def rank_failed(self, event: Mapping[str, Any], time: float, rank: int) -> None:
        # The agent saw all ranks: its word on who was first counts more than a rank's own.
        if self._known.get("outcome") == "failed":
            del self._known["outcome"]
        self.failed(event, time, rank)

    def _ended(self, outcome: Outcome, event: Mapping[str, Any]) -> bool:
        """The first that is told of an end is its cause; what other ranks say follows from it."""
        if "outcome" in self._known:
            return False
        self._known.update(outcome=outcome, detail=describe_event(event, outcome))
        return True


# An attempt that did not begin has no start of its own, and the one before it had ended.
_BETWEEN_ATTEMPTS = frozenset({"nodes_missing"})
_READERS = {
    "run_started": _Open.started,
    "training_started": _Open.training_started,
    "first_step": _Open.first_step,
    "step": _Open.step,
    "ranks": _Open.ranks,
    "validation": _Open.validation,
    "checkpoint": _Open.checkpoint,
    "alert": _Open.alert,
    "memory": _Open.memory,
    "finished": _Open.finished,
    "interrupted": _Open.interrupted,
    "preempted": _Open.interrupted,
    "failed": _Open.failed,
    "out_of_memory": _Open.out_of_memory,
    "rank_failed": _Open.rank_failed,
}
