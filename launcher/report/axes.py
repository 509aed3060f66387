"""Axes and marks that several plots share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.report.records import Numbers
from launcher.report.series import Line
from launcher.report.svg import BAD, DASHES, MUTED, WARN, Key


def set_step_axis(axes: Any) -> None:
    """Make the horizontal axis one of optimizer steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Label the rows of a bar chart, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def use_log2_scale(axes: Any) -> None:
    """Make the vertical axis logarithmic to base 2: loss scales are halved and doubled."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"2^{math.log2(value):.0f}")
    )


def use_log_scale_if_wide(axes: Any, values: Numbers) -> None:
    """Make the vertical axis logarithmic if the values span more than two decades."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)


def cut_outliers(axes: Any, steps: Numbers, values: Numbers, keys: list[Key]) -> None:
    """Start the vertical axis at zero, end it above most values, and mark where values are higher."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    usual = float(np.percentile(finite, 90))
    high = float(finite.max())
    cut = high > 4 * usual > 0
    top = 2 * usual if cut else 1.12 * high
    axes.set_ylim(0, top or 1.0)
    if cut:
        at = np.unique(steps[np.isfinite(values) & (values > top)])
        shown = at[thin(len(at), 100)]
        axes.plot(shown, np.full(len(shown), 0.97), transform=axes.get_xaxis_transform(), linestyle="", marker="^",
                  markersize=6, color=WARN, clip_on=False)  # fmt: skip
        keys.append(Key("higher than the axis", WARN, "up"))


def mark_not_finite(axes: Any, line: Line) -> int:
    """Draw a cross at the upper edge for each value that is not finite; returns how many there are."""
    broken = line.steps[~np.isfinite(line.values)]
    if len(broken):
        shown = broken[thin(len(broken))]
        axes.plot(shown, np.full(len(shown), 0.98), transform=axes.get_xaxis_transform(), linestyle="", marker="x",
                  markersize=6, markeredgewidth=1.8, color=BAD, clip_on=False)  # fmt: skip
    return len(broken)


def mark_restarts(axes: Any, restarts: Sequence[float], keys: list[Key]) -> None:
    """Draw a vertical line at each step that a later attempt started from."""
    for step in restarts[:50]:
        axes.axvline(step, color=MUTED, linewidth=1.3, linestyle=DASHES[2])
    if restarts:
        keys.append(Key("a later attempt starts", MUTED, dash=2))


def thin(count: int, limit: int = 400) -> slice:
    """Evenly spaced indices, at most `limit` out of `count`."""
    return slice(None, None, max(1, -(-count // limit)))
