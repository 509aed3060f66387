"""Axes that look alike in all pictures, and the marks that several of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.report.records import Numbers
from launcher.report.series import Line
from launcher.report.svg import BAD, DASHES, MUTED, WARN, Key

_WIDTH = 10.0


def new_figure(height: float, rows: tuple[float, ...] = (), *, sharex: bool = False) -> tuple[Any, Any]:
    """A figure whose axes lie below those of the page's other figures.

    Args:
        height: in units of 72 points.
        rows: relative heights of several axes; one without.
        sharex: whether those have one horizontal axis.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    FigureCanvasSVG(figure)
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.6 / height, top=1 - 0.12 / height, hspace=0.12)
    grid = figure.subplots(len(rows) or 1, 1, sharex=sharex, height_ratios=rows or None, squeeze=False)[:, 0]
    for axes in grid:
        axes.yaxis.set_label_coords(-0.088, 0.5)
    return figure, grid if rows else grid[0]


def name_steps(axes: Any) -> None:
    """A horizontal axis of optimizer steps: whole numbers, thousands apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows of a picture of bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def scale_by_twos(axes: Any) -> None:
    """A logarithmic vertical axis for loss scales, which are halved and doubled."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"2^{math.log2(value):.0f}")
    )


def choose_scale(axes: Any, finite: Numbers, floor: float | None) -> None:
    """Logarithmic where the values span more than two decades, unless the axis begins at a fixed value."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if floor is None and len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)


def cut_outliers(axes: Any, steps: Numbers, values: Numbers, keys: list[Key]) -> None:
    """Begin the vertical axis at zero and end it where the many are; mark what lies beyond."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    usual = float(np.percentile(finite, 90))
    high = float(finite.max())
    beyond = high > 4 * usual > 0
    top = 2 * usual if beyond else 1.12 * high
    axes.set_ylim(0, top or 1.0)
    if beyond:
        at = np.unique(steps[np.isfinite(values) & (values > top)])
        shown = at[every(len(at), 100)]
        axes.plot(shown, np.full(len(shown), 0.97), transform=axes.get_xaxis_transform(), linestyle="", marker="^",
                  markersize=6, color=WARN, clip_on=False)  # fmt: skip
        keys.append(Key("higher than the axis", WARN, "up"))


def mark_not_finite(axes: Any, line: Line) -> int:
    """A cross at the upper edge for each value that is infinite."""
    broken = line.steps[~np.isfinite(line.values)]
    if len(broken):
        shown = broken[every(len(broken))]
        axes.plot(shown, np.full(len(shown), 0.98), transform=axes.get_xaxis_transform(), linestyle="", marker="x",
                  markersize=6, markeredgewidth=1.8, color=BAD, clip_on=False)  # fmt: skip
    return len(broken)


def mark_restarts(axes: Any, restarts: Sequence[float], keys: list[Key]) -> None:
    """A line at each step where another attempt went on."""
    for step in restarts[:50]:
        axes.axvline(step, color=MUTED, linewidth=1.3, linestyle=DASHES[2])
    if restarts:
        keys.append(Key("another attempt goes on", MUTED, dash=2))


def every(count: int, limit: int = 400) -> slice:
    """An even choice of at most `limit` out of `count`."""
    return slice(None, None, max(1, -(-count // limit)))
