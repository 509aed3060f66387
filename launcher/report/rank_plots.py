"""Plots about the ranks: loss scale, own time, parts of a step's time, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from launcher.report import drawing
from launcher.report.drawing import BAD, DASHES, GRID, INK, MUTED, SERIES, SURFACE, Key, Plot, new_plot
from launcher.report.records import Numbers, RankTable
from launcher.report.series import Line, RankSummary, Skip, decimate
from launcher.report.units import choose_bytes_unit, format_ranks

# More ranks cannot be distinguished in one plot.
_MOST_LINES = len(SERIES)
_BAR: Mapping[str, Any] = {"height": 0.66, "edgecolor": SURFACE, "linewidth": 0.8}


def draw_loss_scale(
    groups: Sequence[tuple[Sequence[int], Sequence[Line]]],
    skips: Sequence[Skip],
    restarts: Sequence[float],
    floor: float,
) -> Plot:
    """Draw the loss scale of all ranks on a logarithmic axis, with skipped steps under it.

    Args:
        groups: ranks with equal loss scales, and their lines.
        skips: intervals in which optimizer steps were skipped.
        restarts: steps that later attempts started from.
        floor: loss scale at which an alert is raised; drawn if it is near the values.
    """
    with new_plot("scale-plot", "Loss scale of all ranks", 3.6, rows=(3.2, 1)) as plot:
        (axes, below), keys = plot.axes, plot.keys
        drawing.use_log2_scale(axes)
        axes.set_ylabel("loss scale")
        for index, (ranks, lines) in enumerate(groups[:_MOST_LINES]):
            for line in lines:
                shown = decimate(line)
                scales = np.where(shown.values > 0, shown.values, np.nan)
                # A loss scale holds until the step that changes it.
                axes.step(shown.steps, scales, where="post", color=SERIES[index], linestyle=DASHES[index],
                          linewidth=2.0 if index == 0 else 1.6)  # fmt: skip
                drawing.mark_not_finite(axes, line)
            keys.append(Key(format_ranks(ranks), SERIES[index], dash=index))
        if floor > 0 and axes.get_ylim()[0] <= 2 * floor:
            axes.axhline(floor, color=BAD, linewidth=1, linestyle=DASHES[2])
            keys.append(Key("floor", BAD, dash=2))
        below.set_ylabel("skipped")
        drawing.set_step_axis(below)
        if skips:
            steps, counts = [s.step for s in skips], [s.count for s in skips]
            # Lines: in a long run, bars would be thinner than a pixel.
            below.vlines(steps, 0, counts, color=BAD, linewidth=1.6)
            below.plot(steps, counts, linestyle="", marker="v", markersize=5, markerfacecolor=BAD, markeredgecolor=BAD)
            for step in _space_out(steps, axes.get_xlim()):
                axes.axvline(step, color=BAD, linewidth=0.7, alpha=0.35)
            keys.append(Key("optimizer steps skipped", BAD, "triangle"))
        below.set_ylim(0, 1.25 * max([1, *(s.count for s in skips)]))
        below.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
        drawing.mark_restarts(axes, restarts, keys)
    return plot


def _space_out(steps: Sequence[int], limits: tuple[float, float]) -> list[int]:
    """At most one step in each 200th of the width."""
    kept: list[int] = []
    for step in steps:
        if not kept or step - kept[-1] > (limits[1] - limits[0]) / 200:
            kept.append(step)
    return kept


def draw_rank_times(tables: Sequence[RankTable], slow: Sequence[int], restarts: Sequence[float]) -> Plot:
    """Draw each rank's own time: a line each, or a band and the ranks in `slow` (slowest first) if there are many."""
    ranks = sorted({rank for table in tables for rank in table.ranks})
    is_band = len(ranks) > _MOST_LINES
    single = sorted(slow[: _MOST_LINES - 1]) if is_band else ranks
    with new_plot("own", "Own time of each rank", 2.9) as plot:
        (axes,), keys = plot.axes, plot.keys
        drawing.set_step_axis(axes)
        axes.set_ylabel("own time a step (ms)")
        if is_band:
            keys += [Key("80% of all ranks", MUTED, "band"), Key("median of all ranks", INK)]
        for table in tables:
            own = {rank: seconds * 1e3 for rank, seconds in table.column("own_seconds").items()}
            if is_band and len(table.steps):
                _draw_band(axes, table.steps, np.array(list(own.values())))
            for index, rank in enumerate(single):
                if rank in own:
                    shown = decimate(Line(table.steps, own[rank]))
                    axes.plot(shown.steps, shown.values, color=SERIES[index], linestyle=DASHES[index], linewidth=1.6)
        keys += [Key(f"rank {rank}", SERIES[index], dash=index) for index, rank in enumerate(single)]
        steps = np.concatenate([np.repeat(table.steps, len(table.ranks)) for table in tables])
        drawing.cut_outliers(axes, steps, np.concatenate([table.own_seconds.ravel() * 1e3 for table in tables]), keys)
        drawing.mark_restarts(axes, restarts, keys)
    return plot


def _draw_band(axes: Any, steps: Numbers, grid: Numbers) -> None:
    """Draw the median and the 10th to 90th percentile of the ranks; `grid` has shape (ranks, steps)."""
    at = drawing.thin(len(steps))
    low, middle, high = np.nanpercentile(grid[:, at], (10, 50, 90), axis=0)
    axes.fill_between(steps[at], low, high, color=MUTED, alpha=0.22, linewidth=0)
    axes.plot(steps[at], middle, color=INK, linewidth=1.6)


def draw_rank_bars(summaries: Sequence[RankSummary]) -> Plot:
    """Draw the parts of a step's time for each rank."""
    step, own, data = (
        np.nan_to_num(np.array([getattr(s, name) for s in summaries], dtype=float)) * 1e3
        for name in ("step_seconds", "own_seconds", "data_seconds")
    )
    forward = np.maximum(own - data, 0)
    rest = np.maximum(step - data - forward, 0)
    parts = (("waits for data", data, SERIES[1]), ("forward pass", forward, SERIES[0]),
             ("backward pass, the other ranks and the optimizer", rest, GRID))  # fmt: skip
    with new_plot("bars", "Parts of a step's time, by rank", 0.8 + 0.3 * len(summaries)) as plot:
        (axes,), left = plot.axes, np.zeros(len(summaries))
        for label, values, color in parts:
            axes.barh(range(len(summaries)), values, left=left, color=color, **_BAR)
            left = left + values
            plot.keys.append(Key(label, color, "bar"))
        drawing.label_rows(axes, [f"rank {s.rank}" for s in summaries])
        axes.set_xlabel("ms a step, median")
    return plot


def draw_memory(planned: Mapping[str, float], measured: Mapping[int, float], limit: float | None) -> Plot:
    """Draw planned memory by part above the measured peak of each rank; all in bytes. `limit` is that of a rank."""
    largest = max([sum(planned.values()), *measured.values()])
    unit, size = choose_bytes_unit(largest)
    labels = [*(["plan"] if planned else []), *(f"rank {rank}" for rank in measured)]
    with new_plot("memory-plot", "Planned and measured memory", 0.8 + 0.3 * len(labels)) as plot:
        (axes,), keys, left = plot.axes, plot.keys, 0.0
        for index, (label, amount) in enumerate(planned.items()):
            axes.barh(0, amount / size, left=left, color=SERIES[index % 6], **_BAR)
            left += amount / size
            keys.append(Key(f"plan: {label}", SERIES[index % 6], "bar"))
        if measured:
            rows = range(len(labels) - len(measured), len(labels))
            axes.barh(rows, [amount / size for amount in measured.values()], color=MUTED, **_BAR)
            keys.append(Key("measured peak", MUTED, "bar"))
        # With a limit far above them, the bars would be too short to read.
        if limit is not None and limit < 4 * largest:
            axes.axvline(limit / size, color=BAD, linewidth=1.4, linestyle=DASHES[1])
            keys.append(Key("limit", BAD, dash=1))
        drawing.label_rows(axes, labels)
        axes.set_xlabel(f"{unit} of one rank")
    return plot
