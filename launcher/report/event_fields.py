"""Checked values of event fields: the events may be of a crashed run, of an older version, or damaged. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

# Integers up to here are exact as floats.
_LARGEST_COUNT = 2**53
_Kind = TypeVar("_Kind")


class Malformed(Exception):  # noqa: N818 -- internal: the reader of events skips the event
    """An event of a known kind lacks a field, or a field has another type."""


def as_number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise Malformed
    return float(value)


def as_any_number(value: Any) -> float:
    """A number, or the text that `launcher.core.events` writes for one that is not finite."""
    if type(value) in (int, float):
        return float(value)
    if isinstance(value, str):
        return float(value)  # the reader handles a ValueError too
    raise Malformed


def as_count(value: Any) -> int:
    """An integer of at least 0 that a float represents exactly."""
    if type(value) is not int or not 0 <= value < _LARGEST_COUNT:
        raise Malformed
    return value


def as_text(value: Any) -> str:
    """Any value as text; empty for None."""
    return "" if value is None else str(value)


def as_type(value: Any, kind: type[_Kind]) -> _Kind:
    """A value of this type: `dict` for a JSON object, `list` for a JSON list."""
    if not isinstance(value, kind):
        raise Malformed
    return value


def as_metrics(value: Any) -> Mapping[str, float]:
    """Name to number."""
    metrics: dict[str, Any] = as_type(value, dict)
    if set(map(type, metrics.values())) == {float}:
        return metrics  # the common case
    return {name: as_any_number(number) for name, number in metrics.items()}
