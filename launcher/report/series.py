"""Numbers of a run, made ready to be drawn or put in a table. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launcher.report.records import AttemptRecord, History, Numbers, RankTable

# More points than these are not told apart on a page.
MOST_POINTS = 700
_LOSS_NAMES = ("loss", "train_loss", "train/loss", "training_loss", "loss_step", "train_loss_step", "loss/train")


@dataclass(frozen=True, slots=True)
class Line:
    """One series over optimizer steps.

    Attributes:
        steps: shape (n,).
        values: shape (n,); NaN where there is none.
    """

    steps: Numbers
    values: Numbers


@dataclass(frozen=True, slots=True)
class Skip:
    """Optimizer steps left out because gradients were not finite.

    Attributes:
        before, step: it was between these steps, the second included.
        count: how many.
    """

    before: int
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class RankSummary:
    """One rank over all of a run.

    Attributes:
        rank: global rank.
        step_seconds, data_seconds, own_seconds: medians over the intervals; NaN if not told.
        own_factor: its own time against the median of the other ranks'; NaN with one rank.
        share_slowest: share of the intervals in which it had the most time of its own.
        skipped_steps: None if nobody counts them.
        peak_memory: bytes; None if not told.
    """

    rank: int
    step_seconds: float
    data_seconds: float
    own_seconds: float
    own_factor: float
    share_slowest: float
    skipped_steps: int | None
    peak_memory: int | None


def decimate(line: Line, limit: int = MOST_POINTS) -> Line:
    """At most about `limit` points: of each stretch the lowest and the highest, so that no spike is lost.

    Values that are not finite are left out if there are too many points, and kept otherwise.
    """
    count = len(line.steps)
    if count <= limit:
        return line
    finite = np.isfinite(line.values)
    steps, values = line.steps[finite], line.values[finite]
    if len(steps) <= limit:
        return Line(steps, values)
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), limit // 2):
        kept.add(int(stretch[np.argmin(values[stretch])]))
        kept.add(int(stretch[np.argmax(values[stretch])]))
    index = np.array(sorted(kept))
    return Line(steps[index], values[index])


def smooth(line: Line, share: float = 0.03) -> Line:
    """The trend: an exponential mean over about `share` of the points, started without bias; not finite values skipped.

    The correction for the start is that of Adam's moments (Kingma and Ba 2015, section 3).
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


def medians(line: Line, blocks: int = 150, least: int = 5) -> Line:
    """The trend of what has outliers: the median of each block of at least `least` points, at most `blocks` of them."""
    finite = np.isfinite(line.values)
    steps, values = line.steps[finite], line.values[finite]
    count = min(blocks, len(steps) // least)
    if count < 2:
        return Line(steps, values)
    parts = np.array_split(np.arange(len(steps)), count)
    return Line(np.array([np.median(steps[p]) for p in parts]), np.array([np.median(values[p]) for p in parts]))


def main_metric(history: History) -> str | None:
    """The metric that is the loss: by its name, else the first whose name says loss, else the first."""
    names = list(dict.fromkeys(name for a in history.attempts for s in a.steps[:50] for name in s.metrics))
    for wanted in _LOSS_NAMES:
        if wanted in names:
            return wanted
    return next((name for name in names if "loss" in name.lower() and "val" not in name.lower()), None) or next(
        iter(names), None
    )


def validation_metric(history: History, main: str | None) -> str | None:
    """The validation's counterpart of the loss."""
    names = list(dict.fromkeys(name for a in history.attempts for v in a.validations for name in v.metrics))
    validated = [name for name in names if "val" in name.lower() and name != main]
    return next((name for name in validated if "loss" in name.lower()), None)


def metric_line(attempt: AttemptRecord, name: str) -> Line:
    """One metric over an attempt's steps."""
    told = [(s.step, s.metrics[name]) for s in attempt.steps if name in s.metrics]
    return _line(told)


def validation_line(attempt: AttemptRecord, name: str) -> Line:
    """One metric over an attempt's validations."""
    return _line([(v.step, v.metrics[name]) for v in attempt.validations if name in v.metrics])


def learning_rate_lines(attempt: AttemptRecord) -> list[Line]:
    """The learning rate of each parameter group."""
    width = max((len(s.learning_rates) for s in attempt.steps), default=0)
    return [
        _line([(s.step, s.learning_rates[i]) for s in attempt.steps if i < len(s.learning_rates)]) for i in range(width)
    ]


def step_time_line(attempt: AttemptRecord) -> Line:
    """Milliseconds of an optimizer step."""
    return _line([(s.step, s.seconds * 1e3) for s in attempt.steps if s.seconds is not None])


def alike(values: Mapping[int, Numbers]) -> list[tuple[tuple[int, ...], Numbers]]:
    """Ranks with the same numbers throughout, together: the largest group first, then by the smallest rank."""
    groups: dict[bytes, tuple[list[int], Numbers]] = {}
    for rank, line in sorted(values.items()):
        groups.setdefault(line.tobytes(), ([], line))[0].append(rank)
    found = [(tuple(ranks), line) for ranks, line in groups.values()]
    return sorted(found, key=lambda group: (-len(group[0]), group[0][0]))


def skips(table: RankTable, start_step: int | None) -> list[Skip]:
    """Where optimizer steps were left out; the count of a resumed run begins with what was skipped before."""
    told = np.isfinite(table.skipped_steps).any(axis=1)
    if not told.any():
        return []
    counts = np.nanmax(table.skipped_steps[told], axis=1)
    steps = table.steps[told]
    # Of a resumed run the first count says nothing of its first interval.
    before = np.concatenate(([counts[0] if start_step else 0.0], counts[:-1]))
    begins = np.concatenate(([float(start_step or 0)], steps[:-1]))
    return [Skip(int(begins[i]), int(steps[i]), int(counts[i] - before[i])) for i in np.flatnonzero(counts > before)]


def skipped_steps(history: History) -> int | None:
    """As the last count says; None if nobody counts them."""
    for attempt in reversed(history.attempts):
        if attempt.rank_table is not None and np.isfinite(attempt.rank_table.skipped_steps).any():
            counts = attempt.rank_table.skipped_steps
            return int(np.nanmax(counts[np.isfinite(counts).any(axis=1)][-1]))
    return None


def summarize_ranks(history: History) -> list[RankSummary]:
    """Each rank over all attempts. Medians: the first interval, with its warm-up, would outweigh a short run."""
    tables = [a.rank_table for a in history.attempts if a.rank_table is not None]
    ranks = sorted({rank for table in tables for rank in table.ranks})
    columns = {
        name: {rank: _joined(tables, name, rank) for rank in ranks}
        for name in ("step_seconds", "data_seconds", "own_seconds", "skipped_steps", "peak_memory")
    }
    own_times = {rank: _median(columns["own_seconds"][rank]) for rank in ranks}
    slowest = _times_slowest(tables)
    total = sum(slowest.values())
    summaries: list[RankSummary] = []
    for rank in ranks:
        others = [own for other, own in own_times.items() if other != rank and math.isfinite(own)]
        median = statistics.median(others) if others else math.nan
        skipped, peak = (columns[n][rank][np.isfinite(columns[n][rank])] for n in ("skipped_steps", "peak_memory"))
        summaries.append(
            RankSummary(
                rank,
                _median(columns["step_seconds"][rank]),
                _median(columns["data_seconds"][rank]),
                own_times[rank],
                own_times[rank] / median if median > 0 else math.nan,
                slowest.get(rank, 0) / total if total else 0.0,
                int(skipped[-1]) if len(skipped) else None,
                int(peak.max()) if len(peak) else None,
            )
        )
    return summaries


def _joined(tables: Sequence[RankTable], name: str, rank: int) -> Numbers:
    """One rank's numbers in all tables that have it."""
    return np.concatenate([table.column(name)[rank] for table in tables if rank in table.ranks])


def _times_slowest(tables: Sequence[RankTable]) -> dict[int, int]:
    """In how many intervals a rank had the most time of its own."""
    found: dict[int, int] = {}
    for table in tables:
        own = np.where(np.isfinite(table.own_seconds), table.own_seconds, -np.inf)
        for position in np.argmax(own[np.isfinite(own).any(axis=1)], axis=1).tolist():
            found[table.ranks[position]] = found.get(table.ranks[position], 0) + 1
    return found


def rank_names(ranks: Sequence[int]) -> str:
    """'rank 0', 'ranks 0-3, 6'."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    named = ", ".join(str(a) if a == b else f"{a}\u2013{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"


def _line(points: Sequence[tuple[int, float]]) -> Line:
    return Line(np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float))


def _median(values: Numbers) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan
