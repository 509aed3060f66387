"""Reads the values of all ranks at each logging interval into arrays. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from launcher.report.event_fields import Malformed
from launcher.report.records import Numbers, RankTable

_COLUMNS = ("loss_scale", "skipped_steps", "step_seconds", "data_seconds", "own_seconds", "peak_memory")


@dataclasses.dataclass(frozen=True, slots=True)
class RankRows:
    """Consecutive intervals with the same ranks.

    Attributes:
        ranks: global ranks.
        steps: optimizer steps done at each interval.
        grids: values of each interval, shape (columns, ranks); NaN where a value is missing.
    """

    ranks: list[int]
    steps: list[int] = dataclasses.field(default_factory=list[int])
    grids: list[Numbers] = dataclasses.field(default_factory=list[Numbers])


def read_rank_grid(event: Mapping[str, Any], ranks: int) -> Numbers:
    """The values of one interval, shape (columns, ranks); a missing column is NaN.

    Raises:
        Malformed: a column has another length, or a value is not a number.
    """
    columns = [[None] * ranks if (column := event.get(name)) is None else column for name in _COLUMNS]
    try:
        # None becomes NaN, and so does the text that `launcher.core.events` writes for it.
        grid = np.array(columns, dtype=float)
    except (TypeError, ValueError, OverflowError) as error:
        raise Malformed from error
    if grid.shape != (len(_COLUMNS), ranks):
        raise Malformed
    return grid


def make_rank_table(rows: list[RankRows]) -> RankTable | None:
    """All intervals in one table; NaN where a rank is missing in an interval."""
    if not rows:
        return None
    ranks = sorted({rank for part in rows for rank in part.ranks})
    steps = np.array([step for part in rows for step in part.steps], dtype=float)
    grids = np.full((len(steps), len(_COLUMNS), len(ranks)), np.nan)
    first = 0
    for part in rows:
        last = first + len(part.steps)
        grids[first:last, :, [ranks.index(rank) for rank in part.ranks]] = np.stack(part.grids)
        first = last
    return RankTable(steps, tuple(ranks), *(grids[:, i] for i in range(len(_COLUMNS))))
