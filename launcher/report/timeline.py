"""Attempts, restarts and preemptions on a line of time."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.axes import label_rows, new_figure
from launcher.report.plots import Picture
from launcher.report.records import AttemptRecord
from launcher.report.svg import BAD, GOOD, GRID, INK, MUTED, SERIES, SURFACE, WARN, Key, plot_style, to_svg
from launcher.report.units import time_unit

# More rows than these would not be read.
MOST_ATTEMPTS = 40
_ENDS = {
    "finished": ("o", GOOD, "circle", "finished"),
    "interrupted": ("s", WARN, "square", "stopped by a signal, after a checkpoint"),
    "failed": ("X", BAD, "cross", "failed"),
    "running": (">", SERIES[0], "up", "still running"),
    "unknown": ("D", MUTED, "diamond", "ended without a word"),
}


def draw_timeline(name: str, description: str, attempts: Sequence[AttemptRecord]) -> Picture:
    """One row an attempt: start-up, training, checkpoints, alerts and the end.

    Args:
        name: unique in the page.
        description: what it shows.
        attempts: at least one; of many the last are drawn.
    """
    shown = attempts[-MOST_ATTEMPTS:]
    begin = attempts[0].started if len(shown) == len(attempts) else shown[0].started
    unit, seconds = time_unit(max(a.last_event for a in shown) - begin)

    def at(time: float) -> float:
        return (time - begin) / seconds

    keys = [Key("start-up", GRID, "bar")]
    if any(a.first_step_time is not None for a in shown):
        keys.append(Key("training", SERIES[0], "bar"))
    with plot_style(name):
        figure, axes = new_figure(0.95 + 0.34 * len(shown))
        for row, attempt in enumerate(shown):
            first = attempt.first_step_time if attempt.first_step_time is not None else attempt.last_event
            common = {"height": 0.5, "edgecolor": SURFACE, "linewidth": 0.8}
            axes.barh(row, at(first) - at(attempt.started), left=at(attempt.started), color=GRID, **common)
            axes.barh(row, at(attempt.last_event) - at(first), left=at(first), color=SERIES[0], alpha=0.75, **common)
            if attempt.checkpoints:
                times = [at(time) for _, time in attempt.checkpoints]
                axes.vlines(times[:: max(1, len(times) // 200)], row - 0.36, row + 0.36, color=INK, linewidth=1.2)
            if attempt.alerts:
                axes.plot([at(a.time) for a in attempt.alerts[:200]], [row - 0.4] * min(len(attempt.alerts), 200),
                          linestyle="", marker="v", markersize=7, color=BAD, clip_on=False)  # fmt: skip
            marker, color, _, _ = _ENDS[attempt.outcome]
            hollow = attempt.outcome == "unknown"
            axes.plot(at(attempt.last_event), row, linestyle="", marker=marker, markersize=8.5, markeredgewidth=1.6,
                      markerfacecolor=SURFACE if hollow else color, markeredgecolor=color if hollow else SURFACE,
                      clip_on=False, zorder=5)  # fmt: skip
        label_rows(axes, [f"attempt {a.number}" for a in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{unit} since the first start")
        if any(a.checkpoints for a in shown):
            keys.append(Key("checkpoint", INK, "tick"))
        if any(a.alerts for a in shown):
            keys.append(Key("alert", BAD, "triangle"))
        for outcome in dict.fromkeys(a.outcome for a in shown):
            _, color, shape, label = _ENDS[outcome]
            keys.append(Key(label, color, shape))
        return Picture(to_svg(figure, name, "Attempts over time", description), tuple(keys))
