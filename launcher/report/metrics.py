"""Every metric that the user logged, as series over optimizer steps. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

from launcher.report.metric_pairs import split_stage
from launcher.report.records import AttemptRecord, History, MetricsRecord, Step
from launcher.report.series import Line, make_line

# Where a metric's values come from: a logging interval, a validation, an epoch, the end, `validate` or `test`.
Source = Literal["step", "validation", "epoch", "end", "evaluation"]
_SOURCES: tuple[Source, ...] = ("step", "validation", "epoch")
_LOSS_NAMES = ("loss", "train_loss", "train/loss", "training_loss", "loss_step", "train_loss_step", "loss/train")
_NO_LINE = make_line(())
_MOST_SPARSE = 60
_Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        source: where most of its values come from.
        lines: one for each attempt, in their order; an attempt that repeated steps has later ones too.
        more_sources: where it changed too, as a loss between two logging intervals.
    """

    name: str
    source: Source
    lines: tuple[Line, ...]
    more_sources: tuple[Source, ...] = ()

    @property
    def is_sparse(self) -> bool:
        """Whether each value can be marked in a plot."""
        return self.source != "step" or max(len(line.steps) for line in self.lines) <= _MOST_SPARSE


@dataclass(frozen=True, slots=True)
class MetricSummary:
    """The values of a metric; each with its optimizer step. `count` is their number, and None is for no finite one."""

    count: int
    last: tuple[float, int]
    lowest: tuple[float, int] | None
    highest: tuple[float, int] | None


def collect_metrics(history: History) -> dict[str, Metric]:
    """All metrics by name, in the order in which they were logged first."""
    found = [_collect(attempt) for attempt in history.attempts]
    metrics: dict[str, Metric] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        lines = tuple(each[name].line if name in each else _NO_LINE for each in found)
        sources: tuple[Source, ...] = tuple(source for each in found if name in each for source in each[name].sources)
        metrics[name] = Metric(name, sources[0], lines, sources[1:])
    # Lightning's loggers get a metric by step and by epoch, and callbacks get both under its own name too.
    for name in [name for name in metrics if {f"{name}_step", f"{name}_epoch"} <= metrics.keys()]:
        del metrics[name]
    for name, value in history.evaluated.items():
        # `validate` logs the names of the training's validation again: its plot does not get a point more.
        if name not in metrics:
            metrics[name] = Metric(name, "evaluation", (make_line([(history.last_step, value)]),))
    return metrics


@dataclass(frozen=True, slots=True)
class _Values:
    """A metric in one attempt; its main source comes first."""

    sources: tuple[Source, ...]
    line: Line


def _collect(attempt: AttemptRecord) -> dict[str, _Values]:
    """Each metric of an attempt with its sources and its values.

    Lightning repeats the last value of a metric in everything that it logs later. So a metric's values are those of
    the events in which it changes: a validation's loss does not change at a logging interval.
    """
    last: dict[str, float] = {}
    changes: dict[str, list[_Points]] = {}
    for source, step, metrics in _merge(attempt):
        for name, value in metrics.items():
            before = last.get(name)
            # NaN is unequal to itself.
            if value != before and (value == value or before is None or before == before):
                changes.setdefault(name, [[] for _ in _SOURCES])[source].append((step, value))
                last[name] = value
    records: Mapping[Source, Sequence[tuple[int, Mapping[str, float]]]] = {
        "step": [(s.step, s.metrics) for s in attempt.steps],
        "validation": [(v.step, v.metrics) for v in attempt.validations],
        "epoch": [(e.step, e.metrics) for e in attempt.epochs],
    }
    found: dict[str, _Values] = {}
    for name, changed in changes.items():
        source = _choose_source([len(points) for points in changed])
        points = [(step, values[name]) for step, values in records[source] if name in values]
        points, more = _add_points(points, changed) if changed[0] else (points, ())
        end = attempt.last_metrics
        # The end may lie between two logging intervals.
        if source == "step" and end is not None and name in end.metrics and end.step > points[-1][0]:
            points.append((end.step, end.metrics[name]))
        found[name] = _Values((source, *more), make_line(points))
    if attempt.last_metrics is not None:
        for name, value in attempt.last_metrics.metrics.items():
            found.setdefault(name, _Values(("end",), make_line([(attempt.last_metrics.step, value)])))
    return found


def _add_points(points: _Points, changed: Sequence[_Points]) -> tuple[_Points, tuple[Source, ...]]:
    """The points with those of steps in between at which the metric changed, and where these come from."""
    seen, points, sources = {step for step, _ in points}, list(points), list[Source]()
    for source, others in zip(_SOURCES, changed, strict=True):
        added = [point for point in others if point[0] not in seen]
        if added:
            seen.update(step for step, _ in added)
            points += added
            sources.append(source)
    return sorted(points, key=itemgetter(0)) if sources else points, tuple(sources)


def _choose_source(changes: Sequence[int]) -> Source:
    """Logging intervals if the metric changes at more than the first of them, else where it changes most."""
    steps, others = changes[0], max(changes[1:])
    return "step" if steps > 1 or steps > others else _SOURCES[1 + changes[1:].index(others)]


def _merge(attempt: AttemptRecord) -> Iterator[tuple[int, int, Mapping[str, float]]]:
    """The attempt's metrics in the order in which they were logged, each with the index of its source and its step."""
    parts = (_tag(attempt.steps, 0), _tag(attempt.validations, 1), _tag(attempt.epochs, 2))
    return ((source, step, metrics) for step, source, metrics in heapq.merge(*parts, key=itemgetter(0, 1)))


def _tag(records: Sequence[Step | MetricsRecord], source: int) -> Iterator[tuple[int, int, Mapping[str, float]]]:
    return ((record.step, source, record.metrics) for record in records)


def find_loss(metrics: Mapping[str, Metric]) -> str | None:
    """The metric that is the training loss: a usual name, else the first name with 'loss', else the first metric.

    None without a metric of the training.
    """
    names = [name for name, metric in metrics.items() if metric.source == "step"]
    others = (name for name, metric in metrics.items() if metric.source != "step")
    names += [name for name in others if split_stage(name)[0] != "test"]
    usual = [name for name in _LOSS_NAMES if name in names]
    likely = [name for name in names if "loss" in name.lower() and "val" not in name.lower()]
    return next(iter([*usual, *likely, *names]), None)


def find_validation_loss(metrics: Mapping[str, Metric]) -> str | None:
    """The metric that is the validation loss."""
    loss = find_loss(metrics)
    found = (name for name, metric in metrics.items() if metric.source != "step" and name != loss)
    return next((name for name in found if "val" in name.lower() and "loss" in name.lower()), None)


def summarize_metric(metric: Metric) -> MetricSummary | None:
    """The last, lowest and highest value; None without a value. Of repeated steps, all count."""
    points = [(value, int(step)) for line in metric.lines
              for step, value in zip(line.steps.tolist(), line.values.tolist(), strict=True)]  # fmt: skip
    if not points:
        return None
    finite = [point for point in points if math.isfinite(point[0])]
    lowest, highest = (f(finite, key=itemgetter(0)) if finite else None for f in (min, max))
    return MetricSummary(len(points), points[-1], lowest, highest)


def to_metric_values(metric: Metric) -> dict[str, object] | None:
    """A metric's summary as JSON values; a value that is not finite is null."""
    summary = summarize_metric(metric)
    if summary is None:
        return None
    values: dict[str, object] = {"logged_at": metric.source, "count": summary.count}
    for label in ("last", "lowest", "highest"):
        value, step = getattr(summary, label) or (None, None)
        values |= {label: value if value is not None and math.isfinite(value) else None, f"{label}_step": step}
    return values
