"""The parts of the page with the metrics that the user logged: the loss, and all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report import series
from launcher.report.drawing import Plot
from launcher.report.metric_pairs import MetricGroup, group_metrics
from launcher.report.metrics import Metric, find_loss, find_validation_loss, summarize_metric
from launcher.report.page import Section, Table
from launcher.report.plots import Curve, CurveAxes, draw_curves
from launcher.report.source import Run, conform
from launcher.report.units import format_count, format_number, join_names

_MOST_RATES = 6
# More curves cannot be distinguished in one plot.
_MOST_CURVES = 6
# Plots that are visible at once; the others open on a click, in parts of so many.
_MOST_OPEN = 12
_PART = 24
# A page with more would be too large to open; the table has the other metrics.
_MOST_PLOTS = 400
_MOST_ROWS_OPEN = 12
# Lightning's `log_every_n_steps`.
_LOGGING_INTERVAL = 50
_SOURCES = {"step": "logged steps", "validation": "validations", "epoch": "epochs", "end": "the end",
            "evaluation": "an evaluation"}  # fmt: skip
METRIC_TERMS = {
    "lowest, highest": "of all values that are finite, with the optimizer step",
    "values": "how many the run recorded, and when",
}


@dataclass(frozen=True, slots=True)
class SmallPlot:
    """One of several plots beside each other."""

    title: str
    plot: Plot
    caption: str


def loss_section(run: Run) -> Section:
    """The loss of training and validation, and the learning rate."""
    history, loss = run.history, find_loss(run.metrics)
    if loss is None:
        return _no_loss_section(run)
    names = _loss_names(run.metrics)
    curves = [to_curve(run.metrics[name], name) for name in names]
    groups = [series.learning_rate_lines(a) for a in history.attempts]
    width = max(map(len, groups), default=0)
    rates = [
        Curve(f"parameter group {i + 1}" if width > 1 else "learning rate", [g[i] for g in groups if i < len(g)])
        for i in range(min(width, _MOST_RATES))
    ]
    every_rate = [rate for a in history.attempts for s in a.steps for rate in s.learning_rates]
    # The metric's own name is in the legend.
    axes = CurveAxes("loss", "Loss", "loss" if "loss" in loss.lower() else "value")
    rate_axes = CurveAxes("rate", "Learning rate", "learning rate", height=1.9)
    values = [value for line in run.metrics[loss].lines for value in line.values.tolist()]
    summary = summarize_metric(run.metrics[loss])
    view = {
        "plot": draw_curves(axes, curves, history.restart_steps),
        "name": loss,
        "first": values[0],
        "last": values[-1],
        "count": len(values),
        "lowest": None if summary is None else summary.lowest,
        "has_trend": any(curve.has_trend for curve in curves),
        "rates": draw_curves(rate_axes, rates, history.restart_steps) if rates else None,
        "rate_range": (min(every_rate), max(every_rate)) if rates else None,
        "interval": _read_interval(run),
        "has_intervals": history.seconds_per_step is not None,
    }
    return Section("loss", "Loss and learning rate", view)


def _read_interval(run: Run) -> int:
    """Steps from one logging interval to the next."""
    given = conform(run.config.get("trainer"), {"log_every_n_steps": float})["log_every_n_steps"]
    return int(given or _LOGGING_INTERVAL)


def _no_loss_section(run: Run) -> Section:
    """Why no metric is known: the model logged none, or the run ended before one was recorded."""
    attempts = run.history.attempts
    view = {
        "steps": run.history.last_step,
        "is_logged": any(a.outcome == "finished" or a.validations or a.epochs for a in attempts),
        "interval": _read_interval(run),
    }
    return Section("loss", "Loss and learning rate", view, "no_loss")


def _loss_names(metrics: Mapping[str, Metric]) -> list[str]:
    """The metrics in the plot of the loss: the training loss and its pairs, and the validation loss."""
    loss = find_loss(metrics)
    names = next((group.names for group in group_metrics(list(metrics)) if loss in group.names), ())
    return list(dict.fromkeys([*names, *filter(None, [find_validation_loss(metrics)])]))[:_MOST_CURVES]


def metrics_section(run: Run) -> Section | None:
    """All other metrics, those of training and validation in one plot, and a table; None if there is only a loss."""
    if not run.metrics:
        return None
    shown = set(_loss_names(run.metrics))
    groups = group_metrics([name for name in run.metrics if name not in shown])
    plots = [
        _draw_group(run, group, f"metric-{number}", 150 if len(groups) <= 2 * _PART else 80)
        for number, group in enumerate(split_groups(groups)[:_MOST_PLOTS])
    ]
    table = _metric_table(run.metrics)
    view = {**arrange(plots), "count": len(run.metrics), "table": table, "is_long": len(table.rows) > _MOST_ROWS_OPEN,
            "not_shown": max(len(groups) - _MOST_PLOTS, 0)}  # fmt: skip
    return Section("metrics", "Metrics", view)


def arrange(plots: Sequence[SmallPlot]) -> dict[str, Any]:
    """The plots that are visible, and the parts that open on a click, each with its title."""
    parts = [plots[i : i + _PART] for i in range(_MOST_OPEN, len(plots), _PART)]
    named = [
        (f"{part[0].title} to {part[-1].title} ({len(part)} plots)" if len(part) > 1 else part[0].title, part)
        for part in parts
    ]
    return {"open": list(plots[:_MOST_OPEN]), "parts": named, "plots": len(plots)}


def split_groups(groups: Iterable[MetricGroup]) -> list[MetricGroup]:
    """The groups, those with too many metrics for a plot in several."""
    found: list[MetricGroup] = []
    for group in groups:
        parts = [group.names[i : i + _MOST_CURVES] for i in range(0, len(group.names), _MOST_CURVES)]
        found += [
            MetricGroup(group.title if len(parts) == 1 else f"{group.title} ({i} of {len(parts)})", names)
            for i, names in enumerate(parts, 1)
        ]
    return found


def _draw_group(run: Run, group: MetricGroup, anchor: str, points: int) -> SmallPlot:
    axes = CurveAxes(anchor, group.title, "", 1.9, is_small=True, points=points)
    curves = [to_curve(run.metrics[name], name) for name in group.names]
    plot = draw_curves(axes, curves, run.history.restart_steps)
    return SmallPlot(group.title, plot, "Last: " + ", ".join(_format_last(run.metrics[name]) for name in group.names))


def _format_last(metric: Metric) -> str:
    summary = summarize_metric(metric)
    return "\u2013" if summary is None else format_number(summary.last[0])


def to_curve(metric: Metric, label: str) -> Curve:
    """The metric as a curve: a line with its trend, or points where there are few values."""
    return Curve(label, metric.lines, trend=not metric.is_sparse, points=metric.is_sparse)


def _metric_table(metrics: Mapping[str, Metric]) -> Table:
    rows: list[tuple[Any, ...]] = []
    for name in [name for group in group_metrics(list(metrics)) for name in group.names]:
        summary = summarize_metric(metrics[name])
        if summary is None:
            continue
        cells = [("\u2013", None) if point is None else (format_number(point[0]), point[1])
                 for point in (summary.last, summary.lowest, summary.highest)]  # fmt: skip
        rows.append((name, cells[0][0], *map(_format_point, cells[1:]),
                     f"{format_count(summary.count)} at {_describe_sources(metrics[name])}"))  # fmt: skip
    return Table("Last, lowest and highest value of each metric", ("metric", "last", "lowest", "highest", "values"),
                 rows, (1, 2, 3), (4,), terms=METRIC_TERMS)  # fmt: skip


def _describe_sources(metric: Metric) -> str:
    sources = {metric.source, *metric.more_sources}
    return join_names([text for source, text in _SOURCES.items() if source in sources])


def _format_point(point: tuple[str, int | None]) -> dict[str, str] | str:
    value, step = point
    return value if step is None else {"text": value, "note": f"step {step:,}"}
