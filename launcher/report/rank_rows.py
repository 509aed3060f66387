"""What all ranks told at each interval: read as plain numbers, and made into arrays. Pure."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import numpy as np

from launcher.report.event_fields import Malformed, as_any_number, as_sequence
from launcher.report.records import Numbers, RankTable

_RANK_COLUMNS = ("loss_scale", "skipped_steps", "step_seconds", "data_seconds", "own_seconds", "peak_memory")
_FAST_TYPES = {int, float, type(None)}
# A whole number may be too large for a float.
_LARGEST_FAST = 1e300
_NAN = math.nan


@dataclasses.dataclass(frozen=True, slots=True)
class RankRows:
    """Intervals with the same ranks, as plain numbers: a long run logs millions, and objects of them take seconds.

    Attributes:
        ranks: of every interval.
        steps: of shape (intervals,).
        values: of shape (intervals, columns, ranks); NaN where there is none.
    """

    ranks: list[int]
    steps: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    values: array[float] = dataclasses.field(default_factory=lambda: array("d"))


def rank_columns(event: Mapping[str, Any], ranks: int) -> list[float]:
    """The columns one after the other, a number a rank."""
    columns = [event.get(name) for name in _RANK_COLUMNS]
    if set(map(type, columns)) == {list} and set(map(len, columns)) == {ranks}:  # type: ignore[arg-type] -- all lists
        numbers = list(chain.from_iterable(cast("list[list[Any]]", columns)))
        types = set(map(type, numbers))
        if types <= _FAST_TYPES and max(filter(None, numbers), default=0.0) < _LARGEST_FAST:
            return [_NAN if value is None else value for value in numbers] if type(None) in types else numbers
    return list(chain.from_iterable(_column(column, ranks) for column in columns))


def _column(value: Any, length: int) -> list[float]:
    """One number a rank, NaN where there is none; all NaN if the column is missing."""
    if value is None:
        return [_NAN] * length
    column = as_sequence(value)
    if len(column) != length:
        raise Malformed
    return [_NAN if v is None else as_any_number(v) for v in column]


def rank_table(rows: list[RankRows]) -> RankTable | None:
    """The rows as arrays; a rank that is missing in some has NaN there."""
    if not rows:
        return None
    ranks = sorted({rank for part in rows for rank in part.ranks}) if len(rows) > 1 else rows[0].ranks
    grids = np.concatenate([_spread(part, ranks) for part in rows])
    steps = np.concatenate([np.array(part.steps, dtype=float) for part in rows])
    return RankTable(steps, tuple(ranks), *(grids[:, i] for i in range(len(_RANK_COLUMNS))))


def _spread(part: RankRows, ranks: list[int]) -> Numbers:
    """Shape (intervals, columns, ranks), for these ranks; a rank that is named twice counts as it was named last."""
    own = np.array(part.values, dtype=float).reshape(len(part.steps), len(_RANK_COLUMNS), len(part.ranks))
    if part.ranks == ranks:
        return own
    grid = np.full((*own.shape[:2], len(ranks)), np.nan)
    grid[:, :, [ranks.index(rank) for rank in part.ranks]] = own
    return grid
