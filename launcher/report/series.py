"""Series and summaries computed from a run's records. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.config.schema import WatchOptions
from launcher.report.records import AttemptRecord, History, Numbers, RankTable

# More points are not visible on a page.
MOST_POINTS = 700


@dataclass(frozen=True, slots=True)
class Line:
    """One series over optimizer steps; both arrays have shape (n,), and a missing value is NaN."""

    steps: Numbers
    values: Numbers


@dataclass(frozen=True, slots=True)
class Skip:
    """Number of optimizer steps skipped because gradients were not finite, after step `before` up to `step`."""

    before: int
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class RankSummary:
    """One rank over all attempts.

    Attributes:
        step_seconds, data_seconds, own_seconds: medians over the intervals; NaN if not recorded.
        own_factor: its own time divided by the median of the other ranks; NaN with one rank.
        share_slowest: share of the intervals in which its own time was the longest.
        skipped_steps: None if not counted.
    """

    rank: int
    step_seconds: float
    data_seconds: float
    own_seconds: float
    own_factor: float
    share_slowest: float
    skipped_steps: int | None


def decimate(line: Line, limit: int = MOST_POINTS) -> Line:
    """At most about `limit` points: the lowest and the highest of each block, so that spikes stay visible.

    Values that are not finite are dropped if there are too many points.
    """
    if len(line.steps) <= limit:
        return line
    finite = np.isfinite(line.values)
    steps, values = line.steps[finite], line.values[finite]
    if len(steps) <= limit:
        return Line(steps, values)
    kept = {0, len(steps) - 1}
    for block in np.array_split(np.arange(len(steps)), limit // 2):
        kept |= {int(block[np.argmin(values[block])]), int(block[np.argmax(values[block])])}
    index = np.array(sorted(kept))
    return Line(steps[index], values[index])


def smooth(line: Line, share: float = 0.03) -> Line:
    """Exponential mean over about `share` of the points, with bias correction; skips values that are not finite.

    The correction is that of Adam's moments (Kingma and Ba 2015, section 3).
    """
    weight = 1 - 1 / max(len(line.values) * share, 1.0)
    mean, norm = 0.0, 0.0
    out: list[float] = []
    for value in line.values.tolist():
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        out.append(mean / norm if norm else math.nan)
    return Line(line.steps, np.array(out))


def smooth_by_medians(line: Line, blocks: int = 150, least: int = 5) -> Line:
    """Median of each block of at least `least` points, at most `blocks` blocks: a trend without outliers."""
    finite = np.isfinite(line.values)
    steps, values = line.steps[finite], line.values[finite]
    count = min(blocks, len(steps) // least)
    if count < 2:
        return Line(steps, values)
    parts = np.array_split(np.arange(len(steps)), count)
    return Line(np.array([np.median(steps[p]) for p in parts]), np.array([np.median(values[p]) for p in parts]))


def learning_rate_lines(attempt: AttemptRecord) -> list[Line]:
    """The learning rate of each parameter group."""
    width = max((len(s.learning_rates) for s in attempt.steps), default=0)
    rates = [(s.step, s.learning_rates) for s in attempt.steps]
    return [make_line((step, each[i]) for step, each in rates if i < len(each)) for i in range(width)]


def step_time_line(attempt: AttemptRecord) -> Line:
    """Milliseconds of an optimizer step."""
    return make_line((s.step, s.seconds * 1e3) for s in attempt.steps if s.seconds is not None)


def loss_scale_line(attempt: AttemptRecord) -> Line:
    """Loss scale of rank 0, without the intervals that have none."""
    table = attempt.rank_table
    if table is None or 0 not in table.ranks:
        return make_line(())
    scales = table.column("loss_scale")[0]
    return Line(table.steps[scales > 0], scales[scales > 0])


def group_by_loss_scale(tables: Sequence[RankTable]) -> list[tuple[tuple[int, ...], list[Line]]]:
    """Ranks that had the same loss scale throughout, with one line for each attempt; without ranks that had none."""
    columns = [
        (table.steps, {r: v for r, v in table.column("loss_scale").items() if not np.isnan(v).all()})
        for table in tables
    ]
    joined = {
        rank: np.concatenate([ranks.get(rank, np.full(len(steps), np.nan)) for steps, ranks in columns])
        for rank in {rank for _, ranks in columns for rank in ranks}
    }
    return [
        (ranks, [Line(steps, scales[ranks[0]]) for steps, scales in columns if ranks[0] in scales])
        for ranks in group_equal(joined)
    ]


def group_equal(values: Mapping[int, Numbers]) -> list[tuple[int, ...]]:
    """Groups of ranks with equal values: the largest group first, then by the lowest rank."""
    groups: dict[bytes, list[int]] = {}
    for rank, line in sorted(values.items()):
        groups.setdefault(line.tobytes(), []).append(rank)
    return sorted(map(tuple, groups.values()), key=lambda ranks: (-len(ranks), ranks[0]))


def find_skips(table: RankTable, start_step: int | None) -> list[Skip]:
    """Intervals in which optimizer steps were skipped. A resumed run starts with the count of its checkpoint."""
    counted = np.isfinite(table.skipped_steps).any(axis=1)
    if not counted.any():
        return []
    counts = np.nanmax(table.skipped_steps[counted], axis=1)
    steps = table.steps[counted]
    # The first count of a resumed run does not show how many of its first interval are new.
    before = np.concatenate(([counts[0] if start_step else 0.0], counts[:-1]))
    begins = np.concatenate(([float(start_step or 0)], steps[:-1]))
    return [Skip(int(begins[i]), int(steps[i]), int(counts[i] - before[i])) for i in np.flatnonzero(counts > before)]


def count_skipped_steps(history: History) -> int | None:
    """The last recorded count; None if skipped steps are not counted."""
    for table in reversed(history.rank_tables):
        counts = table.skipped_steps[np.isfinite(table.skipped_steps).any(axis=1)]
        if len(counts):
            return int(np.nanmax(counts[-1]))
    return None


def summarize_ranks(history: History) -> list[RankSummary]:
    """Each rank over all attempts. Medians: in a short run the warm-up would dominate a mean."""
    tables = history.rank_tables
    ranks = sorted({rank for table in tables for rank in table.ranks})

    def join(name: str, rank: int) -> Numbers:
        values = np.concatenate([table.column(name)[rank] for table in tables if rank in table.ranks])
        return values[np.isfinite(values)]

    def medians(name: str) -> dict[int, float]:
        return {rank: float(np.median(v)) if len(v := join(name, rank)) else math.nan for rank in ranks}

    step, data, own = medians("step_seconds"), medians("data_seconds"), medians("own_seconds")
    slowest = _count_slowest(tables)
    summaries: list[RankSummary] = []
    for rank in ranks:
        others = [seconds for other, seconds in own.items() if other != rank and math.isfinite(seconds)]
        median = statistics.median(others) if others else math.nan
        skipped = join("skipped_steps", rank)
        summaries.append(
            RankSummary(
                rank, step[rank], data[rank], own[rank],
                own_factor=own[rank] / median if median > 0 else math.nan,
                share_slowest=slowest.get(rank, 0) / max(sum(slowest.values()), 1),
                skipped_steps=int(skipped[-1]) if len(skipped) else None,
            )
        )  # fmt: skip
    return summaries


def _count_slowest(tables: Sequence[RankTable]) -> dict[int, int]:
    """Rank to the number of intervals in which its own time was the longest."""
    found: dict[int, int] = {}
    for table in tables:
        own = np.where(np.isfinite(table.own_seconds), table.own_seconds, -np.inf)
        for position in np.argmax(own[np.isfinite(own).any(axis=1)], axis=1).tolist():
            found[table.ranks[position]] = found.get(table.ranks[position], 0) + 1
    return found


def find_stragglers(summaries: Sequence[RankSummary], watch: WatchOptions) -> list[int]:
    """Ranks that slowed the run down as a whole, by the rule of the alerts (`launcher.monitoring.health`)."""
    slow: list[int] = []
    for summary in summaries:
        others = summary.own_seconds / summary.own_factor if summary.own_factor else math.nan
        more = summary.own_seconds - others
        if summary.own_factor >= watch.slow_factor and more >= watch.slow_share * summary.step_seconds:
            slow.append(summary.rank)
    return slow


def make_line(points: Iterable[tuple[int, float]]) -> Line:
    """A series of pairs of an optimizer step and a value."""
    pairs = np.array(list(points), dtype=float).reshape(-1, 2)
    return Line(pairs[:, 0], pairs[:, 1])
