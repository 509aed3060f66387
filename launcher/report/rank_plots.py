"""The pictures about ranks: loss scale, own time, where a step's time goes, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launcher.report.axes import (
    cut_outliers,
    every,
    label_rows,
    mark_not_finite,
    mark_restarts,
    name_steps,
    new_figure,
    scale_by_twos,
)
from launcher.report.plots import Picture
from launcher.report.records import Numbers
from launcher.report.series import Line, Skip, decimate
from launcher.report.svg import BAD, DASHES, GRID, INK, MUTED, SERIES, SURFACE, Key, plot_style, to_svg

# Ranks beyond these are not told apart in one picture.
_MOST_LINES = len(SERIES)


def draw_loss_scale(
    name: str,
    description: str,
    groups: Sequence[tuple[str, Sequence[Line]]],
    skips: Sequence[Skip],
    *,
    restarts: Sequence[float] = (),
    floor: float | None = None,
) -> Picture:
    """The loss scale of all ranks on a logarithmic axis, with skipped steps under it.

    Args:
        name: unique in the page.
        description: what it shows.
        groups: ranks with equal scales: their name and their lines.
        skips: where optimizer steps were left out.
        restarts: steps at which another attempt went on.
        floor: a loss scale at or below it has collapsed; drawn where it is in sight.
    """
    from matplotlib.ticker import MaxNLocator

    keys: list[Key] = []
    with plot_style(name):
        figure, (axes, below) = new_figure(3.6, rows=(3.2, 1), sharex=True)
        scale_by_twos(axes)
        axes.set_ylabel("loss scale")
        for index, (label, lines) in enumerate(groups[:_MOST_LINES]):
            for line in lines:
                shown = decimate(line)
                scales = np.where(shown.values > 0, shown.values, np.nan)
                # A scale holds until the step that changes it.
                axes.step(shown.steps, scales, where="post", color=SERIES[index], linestyle=DASHES[index],
                          linewidth=2.0 if index == 0 else 1.6)  # fmt: skip
                mark_not_finite(axes, line)
            keys.append(Key(label, SERIES[index], dash=index))
        if floor is not None and floor > 0 and axes.get_ylim()[0] <= 2 * floor:
            axes.axhline(floor, color=BAD, linewidth=1, linestyle=DASHES[2])
            keys.append(Key("floor", BAD, dash=2))
        below.set_ylabel("skipped")
        name_steps(below)
        # Bars would be thinner than a pixel in a long run.
        if skips:
            below.vlines([s.step for s in skips], 0, [s.count for s in skips], color=BAD, linewidth=1.6)
            below.plot([s.step for s in skips], [s.count for s in skips], linestyle="", marker="v", markersize=5,
                       markerfacecolor=BAD, markeredgecolor=BAD)  # fmt: skip
            for skip in _spread(skips, axes.get_xlim()):
                axes.axvline(skip.step, color=BAD, linewidth=0.7, alpha=0.35)
            keys.append(Key("optimizer steps skipped", BAD, "triangle"))
        below.set_ylim(0, 1.25 * max([1, *(s.count for s in skips)]))
        below.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
        mark_restarts(axes, restarts, keys)
        return Picture(to_svg(figure, name, "Loss scale of all ranks", description), tuple(keys))


def draw_rank_times(
    name: str,
    description: str,
    attempts: Sequence[tuple[Numbers, Mapping[int, Numbers]]],
    slow: Sequence[int],
    restarts: Sequence[float] = (),
) -> Picture:
    """Each rank's own time over the steps: a line each, or a band with the slowest where they are many.

    Args:
        name: unique in the page.
        description: what it shows.
        attempts: for each, steps of shape (n,) and for each rank milliseconds of shape (n,).
        slow: ranks to be drawn out of the band, the slowest first.
        restarts: steps at which another attempt went on.
    """
    keys: list[Key] = []
    ranks = sorted({rank for _, own in attempts for rank in own})
    many = len(ranks) > _MOST_LINES
    single = sorted(slow[: _MOST_LINES - 1]) if many else ranks
    with plot_style(name):
        figure, axes = new_figure(2.9)
        name_steps(axes)
        axes.set_ylabel("own time a step (ms)")
        if many:
            keys += [Key("80% of all ranks", MUTED, "band"), Key("median of all ranks", INK)]
        for steps, own in attempts:
            if many and len(steps):
                _band(axes, steps, np.array(list(own.values())))
            for index, rank in enumerate(single):
                if rank in own:
                    shown = decimate(Line(steps, own[rank]))
                    axes.plot(shown.steps, shown.values, color=SERIES[index], linestyle=DASHES[index], linewidth=1.6)
        keys += [Key(f"rank {rank}", SERIES[index], dash=index) for index, rank in enumerate(single)]
        steps = np.concatenate([np.tile(steps, len(own)) for steps, own in attempts])
        cut_outliers(axes, steps, np.concatenate([line for _, own in attempts for line in own.values()]), keys)
        mark_restarts(axes, restarts, keys)
        return Picture(to_svg(figure, name, "Own time of each rank", description), tuple(keys))


def draw_rank_bars(
    name: str, description: str, ranks: Sequence[int], data: Numbers, forward: Numbers, rest: Numbers
) -> Picture:
    """Where a step's time goes, rank by rank.

    Args:
        name: unique in the page.
        description: what it shows.
        ranks: top to bottom.
        data: milliseconds, shape (ranks,); so are the next two.
        forward: of the forward pass.
        rest: of all else.
    """
    parts = (("waits for data", data, SERIES[1]), ("forward pass", forward, SERIES[0]),
             ("backward pass, the other ranks and the optimizer", rest, GRID))  # fmt: skip
    with plot_style(name):
        figure, axes = new_figure(0.8 + 0.3 * len(ranks))
        left = np.zeros(len(ranks))
        for _, values, color in parts:
            axes.barh(range(len(ranks)), values, left=left, color=color, height=0.66, edgecolor=SURFACE, linewidth=0.8)
            left = left + values
        label_rows(axes, [f"rank {rank}" for rank in ranks])
        axes.set_xlabel("ms a step, median")
        keys = tuple(Key(label, color, "bar") for label, _, color in parts)
        return Picture(to_svg(figure, name, "Where a step's time goes, by rank", description), keys)


def draw_memory(
    name: str,
    description: str,
    planned: Sequence[tuple[str, float]],
    measured: Sequence[tuple[str, float]],
    limit: float | None,
    unit: str,
) -> Picture:
    """Planned memory by part beside the measured peak of each rank.

    Args:
        name: unique in the page.
        description: what it shows.
        planned: part and amount, in `unit`; empty without a plan.
        measured: rank and amount.
        limit: what a rank may use; None if not known.
        unit: of all amounts.
    """
    keys: list[Key] = []
    with plot_style(name):
        labels = [*(["plan"] if planned else []), *(label for label, _ in measured)]
        figure, axes = new_figure(0.8 + 0.3 * len(labels))
        left = 0.0
        for index, (label, amount) in enumerate(planned):
            color = SERIES[index % 6]
            axes.barh(0, amount, left=left, color=color, height=0.66, edgecolor=SURFACE, linewidth=0.8)
            left += amount
            keys.append(Key(f"plan: {label}", color, "bar"))
        offset = len(labels) - len(measured)
        if measured:
            axes.barh([offset + i for i in range(len(measured))], [amount for _, amount in measured], color=MUTED,
                      height=0.66, edgecolor=SURFACE, linewidth=0.8)  # fmt: skip
            keys.append(Key("measured peak", MUTED, "bar"))
        # A limit far away would leave nothing to be seen of the rest.
        if limit is not None and limit < 4 * max([left, *(amount for _, amount in measured)]):
            axes.axvline(limit, color=BAD, linewidth=1.4, linestyle=DASHES[1])
            keys.append(Key("limit", BAD, dash=1))
        label_rows(axes, labels)
        axes.set_xlabel(f"{unit} of one rank")
        return Picture(to_svg(figure, name, "Planned and measured memory", description), tuple(keys))


def _band(axes: Any, steps: Numbers, grid: Numbers) -> None:
    """Where most of the ranks are; `grid` has shape (ranks, steps)."""
    at = every(len(steps))
    low, middle, high = np.nanpercentile(grid[:, at], (10, 50, 90), axis=0)
    axes.fill_between(steps[at], low, high, color=MUTED, alpha=0.22, linewidth=0)
    axes.plot(steps[at], middle, color=INK, linewidth=1.6)


def _spread(skips: Sequence[Skip], limits: tuple[float, float]) -> list[Skip]:
    """At most one in each two-hundredth of the width."""
    width = (limits[1] - limits[0]) / 200
    kept: list[Skip] = []
    for skip in skips:
        if not kept or skip.step - kept[-1].step > width:
            kept.append(skip)
    return kept
