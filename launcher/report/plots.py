"""Curves over optimizer steps, of one run or of two. Texts of the user's stand in the page's legends alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.report.axes import (
    choose_scale,
    cut_outliers,
    mark_not_finite,
    mark_restarts,
    name_steps,
    new_figure,
    scale_by_twos,
)
from launcher.report.series import Line, decimate, medians, smooth
from launcher.report.svg import BAD, DASHES, SERIES, SURFACE, Key, plot_style, to_svg


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure with its legend.

    Attributes:
        svg: an element for the page.
        keys: what its colours mean.
    """

    svg: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity in one run: a line for each attempt.

    Attributes:
        label: what the legend says.
        lines: in the order of the attempts.
        trend: whether the points scatter, so that a smooth line is drawn over them.
        points: whether each point is marked, and few are expected.
    """

    label: str
    lines: Sequence[Line]
    trend: bool = False
    points: bool = False


def draw_curves(
    name: str,
    title: str,
    description: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    restarts: Sequence[float] = (),
    height: float = 3.0,
    from_zero: bool = False,
    by_twos: bool = False,
) -> Picture:
    """Curves over optimizer steps.

    Args:
        name: unique in the page.
        title: for those who do not see it.
        description: what it shows.
        unit: label of the vertical axis.
        curves: at most six.
        restarts: steps at which another attempt went on.
        height: in units of 72 points.
        by_twos: whether the values are loss scales.
        from_zero: whether the vertical axis begins at zero and leaves out rare high values, as times need it.
    """
    keys: list[Key] = []
    with plot_style(name):
        figure, axes = new_figure(height)
        name_steps(axes)
        axes.set_ylabel(unit)
        values = np.concatenate([line.values for c in curves for line in c.lines] or [np.array([])])
        if by_twos:
            scale_by_twos(axes)
        else:
            choose_scale(axes, values[np.isfinite(values)], 0.0 if from_zero else None)
        broken = 0
        for index, curve in enumerate(curves):
            color, dash = SERIES[index % len(SERIES)], DASHES[index % len(DASHES)]
            for number, line in enumerate(curve.lines):
                # What a later attempt did again is faint.
                later = [o.steps[0] for o in curve.lines[number + 1 :] if len(o.steps)]
                for part, faint in _split(line, min(later, default=math.inf)):
                    _draw(axes, curve, part, color, dash, faint, medians if from_zero else smooth)
                broken += mark_not_finite(axes, line)
            keys.append(Key(curve.label, color, dash=index))
        if from_zero:
            steps = np.concatenate([line.steps for c in curves for line in c.lines] or [np.array([])])
            cut_outliers(axes, steps, values, keys)
        if broken:
            keys.append(Key("not finite", BAD, "cross"))
        mark_restarts(axes, restarts, keys)
        return Picture(to_svg(figure, name, title, description), tuple(keys))


def _draw(
    axes: Any, curve: Curve, line: Line, color: str, dash: Any, faint: bool, trend_of: Callable[[Line], Line]
) -> None:
    alpha = 0.35 if faint else 1.0
    shown = decimate(line)
    if curve.points or len(shown.steps) == 1:
        axes.plot(shown.steps, shown.values, color=color, linestyle=dash, linewidth=1.6, alpha=alpha, marker="o",
                  markersize=5, markerfacecolor=SURFACE, markeredgecolor=color, markeredgewidth=1.8)  # fmt: skip
    elif curve.trend and len(line.steps) > 30:
        axes.plot(shown.steps, shown.values, color=color, linewidth=0.8, alpha=0.45 * alpha)
        trend = decimate(trend_of(line))
        axes.plot(trend.steps, trend.values, color=color, linestyle=dash, linewidth=2.0, alpha=alpha)
    else:
        axes.plot(shown.steps, shown.values, color=color, linestyle=dash, linewidth=1.8, alpha=alpha)


def _split(line: Line, at: float) -> list[tuple[Line, bool]]:
    """The part up to step `at`, and the part after it, which is faint."""
    first = line.steps < at
    parts = [
        (Line(line.steps[first], line.values[first]), False),
        (Line(line.steps[~first], line.values[~first]), True),
    ]
    return [(part, faint) for part, faint in parts if len(part.steps)]
