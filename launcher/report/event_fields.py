"""Checked values of event fields: the events may be of a crashed run, of an older version, or damaged. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

# Integers up to here are exact as floats.
_LARGEST_COUNT = 2**53


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


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise Malformed
    return cast("dict[str, Any]", value)


def as_sequence(value: Any) -> list[Any]:
    """A JSON list."""
    if not isinstance(value, list):
        raise Malformed
    return cast("list[Any]", value)


def as_metrics(value: Any) -> Mapping[str, float]:
    """Name to number."""
    metrics = as_mapping(value)
    if set(map(type, metrics.values())) == {float}:
        return metrics  # the common case
    return {name: as_any_number(number) for name, number in metrics.items()}
