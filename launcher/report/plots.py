"""Plots about a run: curves over optimizer steps, of one run or of two, and attempts over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from launcher.report import drawing
from launcher.report.drawing import BAD, DASHES, GOOD, GRID, INK, MUTED, SERIES, SURFACE, WARN, Key, Plot, new_plot
from launcher.report.records import AttemptRecord
from launcher.report.series import MOST_POINTS, Line, decimate, smooth, smooth_by_medians
from launcher.report.units import choose_time_unit

# More rows in the plot of attempts would not be readable.
MOST_ATTEMPTS = 40
_MOST_MARKS = 200
# More markers on a line hide it.
_MOST_MARKED = 60
# The trend of fewer values would lie on them: it is a mean over three values in a hundred.
LEAST_FOR_TREND = 61
# Marker of matplotlib, colour, shape of the legend's entry, and label of each end.
_ENDS = {
    "finished": ("o", GOOD, "circle", "finished"),
    "interrupted": ("s", WARN, "square", "stopped by a signal"),
    "failed": ("X", BAD, "cross", "failed"),
    "running": (">", SERIES[0], "up", "still running"),
    "unknown": ("D", MUTED, "diamond", "ended without a record"),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity of one run.

    Attributes:
        lines: one for each attempt.
        trend: whether to draw a smooth trend of many values.
        points: whether to mark each of few values.
        series: number of the curve's colour and dashes; its position in the plot if it is None.
        is_background: whether it is one of many that are only a comparison for the others.
    """

    label: str
    lines: Sequence[Line]
    trend: bool = False
    points: bool = False
    series: int | None = None
    is_background: bool = False

    @property
    def has_trend(self) -> bool:
        """Whether a trend is drawn beside the values."""
        return self.trend and any(len(part.steps) >= LEAST_FOR_TREND for part, _ in self.split())

    def split(self) -> Iterator[tuple[Line, bool]]:
        """Each line in two parts, without empty ones, and whether a later attempt did its steps again."""
        for attempt, line in enumerate(self.lines):
            later = min((other.steps[0] for other in self.lines[attempt + 1 :] if len(other.steps)), default=math.inf)
            for mask, is_repeated in ((line.steps < later, False), (line.steps >= later, True)):
                if mask.any():
                    yield Line(line.steps[mask], line.values[mask]), is_repeated


@dataclass(frozen=True, slots=True)
class CurveAxes:
    """What a plot of curves shows.

    Attributes:
        name: unique in the page.
        title: for screen readers.
        unit: label of the vertical axis.
        height: in units of 72 points.
        kind: 'time' starts the axis at zero and leaves out rare high values; 'loss scale' is logarithmic to base 2.
        is_small: for one of several plots beside each other.
        points: at most about so many of a curve are drawn.
    """

    name: str
    title: str
    unit: str
    height: float = 3.0
    kind: Literal["value", "time", "loss scale"] = "value"
    is_small: bool = False
    points: int = MOST_POINTS


def draw_curves(spec: CurveAxes, curves: Sequence[Curve], restarts: Sequence[float] = ()) -> Plot:
    """Draw curves over optimizer steps, and mark `restarts`: the steps that later attempts started from."""
    with new_plot(spec.name, spec.title, spec.height, is_small=spec.is_small) as plot:
        (axes,), keys = plot.axes, plot.keys
        drawing.set_step_axis(axes)
        axes.set_ylabel(spec.unit)
        lines = [line for curve in curves for line in curve.lines]
        values = np.concatenate([line.values for line in lines] or [np.array([])])
        if spec.kind == "loss scale":
            drawing.use_log2_scale(axes)
        elif spec.kind == "value":
            drawing.use_log_scale_if_wide(axes, values)
        for index, curve in enumerate(curves):
            number = index if curve.series is None else curve.series
            # Curves of the same colour have other dashes.
            dash = (number + number // len(SERIES)) % len(DASHES)
            style = {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[dash]}
            if curve.is_background:
                style = {"color": MUTED, "linestyle": DASHES[0], "zorder": 1.5}
            for part, is_repeated in curve.split():
                # Steps that a later attempt did again are faint.
                alpha = 0.35 if is_repeated else 0.4 if curve.is_background else 1.0
                _draw_line(axes, spec, curve, part, {**style, "alpha": alpha})
            if curve.label:
                shape = "points" if curve.points else "line"
                keys.append(Key(curve.label, style["color"], shape, 0 if curve.is_background else dash))
        if spec.kind == "time":
            drawing.cut_outliers(axes, np.concatenate([line.steps for line in lines] or [np.array([])]), values, keys)
        if sum(drawing.mark_not_finite(axes, line) for line in lines):
            keys.append(Key("not finite", BAD, "cross"))
        drawing.mark_restarts(axes, restarts, keys)
    return plot


def _draw_line(axes: Any, spec: CurveAxes, curve: Curve, line: Line, style: dict[str, Any]) -> None:
    shown = decimate(line, spec.points)
    is_marked = curve.points and not curve.is_background and len(line.steps) <= _MOST_MARKED
    if is_marked or len(line.steps) == 1:
        axes.plot(shown.steps, shown.values, linewidth=1.6, marker="o", markersize=5, markerfacecolor=SURFACE,
                  markeredgecolor=style["color"], markeredgewidth=1.8, **style)  # fmt: skip
    elif curve.trend and len(line.steps) >= LEAST_FOR_TREND:
        axes.plot(shown.steps, shown.values, color=style["color"], linewidth=0.8, alpha=0.45 * style["alpha"])
        trend = decimate((smooth_by_medians if spec.kind == "time" else smooth)(line), spec.points)
        axes.plot(trend.steps, trend.values, linewidth=2.0, **style)
    else:
        axes.plot(shown.steps, shown.values, linewidth=1.8, **style)


def draw_attempts(attempts: Sequence[AttemptRecord], *, has_steps: bool = True) -> Plot:
    """Draw one row for each of the last `MOST_ATTEMPTS` attempts: start-up, training, checkpoints, alerts, end.

    Without `has_steps`, as for a plain script, an attempt is running from its start.
    """
    shown = attempts[-MOST_ATTEMPTS:]
    begin = shown[0].started
    unit, seconds = choose_time_unit(max(a.last_event for a in shown) - begin)

    def at(time: float) -> float:
        return (time - begin) / seconds

    with new_plot("timeline", "Attempts over time", 0.95 + 0.34 * len(shown)) as plot:
        (axes,), keys = plot.axes, plot.keys
        for row, attempt in enumerate(shown):
            trained = attempt.last_event if attempt.first_step_time is None else attempt.first_step_time
            trained = trained if has_steps else attempt.started
            for start, end, style in (
                (attempt.started, trained, {"color": GRID}),
                (trained, attempt.last_event, {"color": SERIES[0], "alpha": 0.75}),
            ):
                axes.barh(row, at(end) - at(start), left=at(start), height=0.5, edgecolor=SURFACE, linewidth=0.8,
                          **style)  # fmt: skip
            times = [at(time) for _, time in attempt.checkpoints]
            axes.vlines(times[:: max(1, len(times) // _MOST_MARKS)], row - 0.36, row + 0.36, color=INK, linewidth=1.2)
            alerts = [at(alert.time) for alert in attempt.alerts[:_MOST_MARKS]]
            axes.plot(alerts, [row - 0.4] * len(alerts), linestyle="", marker="v", markersize=7, color=BAD,
                      clip_on=False)  # fmt: skip
            marker, color, _, _ = _ENDS[attempt.outcome]
            fill, edge = (SURFACE, color) if attempt.outcome == "unknown" else (color, SURFACE)
            axes.plot(at(attempt.last_event), row, linestyle="", marker=marker, markersize=8.5, markeredgewidth=1.6,
                      markerfacecolor=fill, markeredgecolor=edge, clip_on=False, zorder=5)  # fmt: skip
        drawing.label_rows(axes, [f"attempt {a.number}" for a in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{unit} since the first start")
        keys.append(Key("start-up", GRID, "bar") if has_steps else Key("running", SERIES[0], "bar"))
        for is_shown, key in (
            (any(a.first_step_time is not None for a in shown), Key("training", SERIES[0], "bar")),
            (any(a.checkpoints for a in shown), Key("checkpoint", INK, "tick")),
            (any(a.alerts for a in shown), Key("alert", BAD, "triangle")),
        ):
            keys.extend([key] if is_shown else [])
        for outcome in dict.fromkeys(a.outcome for a in shown):
            _, color, shape, label = _ENDS[outcome]
            keys.append(Key(label, color, shape))
    return plot
