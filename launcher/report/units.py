"""Formats values for the page, in Python and as filters of the templates; a missing value is a dash."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from strategies import units

_MIB = 2**20
_DASH = "\u2013"


def format_number(value: float | None, digits: int = 4) -> str:
    """'2.346', '1.2e-05', 'NaN'."""
    if value is None:
        return _DASH
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def format_count(value: float | None) -> str:
    """An integer with separators: '12,345'."""
    return _DASH if value is None else f"{int(value):,}"


def format_plural(value: int, noun: str) -> str:
    """'1 step', '2 steps'."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def format_duration(seconds: float | None) -> str:
    """'350 ms', '12.4 s', '3 min 20 s', '2 h 05 min', '3 d 4 h'."""
    return _DASH if seconds is None or not math.isfinite(seconds) else units.format_duration(seconds)


def format_milliseconds(seconds: float | None) -> str:
    """'12.4' for 0.0124 seconds."""
    if seconds is None or not math.isfinite(seconds):
        return _DASH
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def format_bytes(amount: float | None) -> str:
    """'1.25 GiB'."""
    return _DASH if amount is None else units.format_bytes(int(amount))


def format_time(seconds: float) -> str:
    """'2026-11-25 01:44:31', in the local time zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return format_number(seconds)


def format_ranks(ranks: Sequence[int]) -> str:
    """'rank 0', 'ranks 0\u20133, 6'."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    named = ", ".join(str(first) if first == last else f"{first}{_DASH}{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"


def join_names(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def choose_bytes_unit(largest: float) -> tuple[str, float]:
    """The unit of an axis up to `largest` bytes, and its bytes."""
    return ("GiB", units.GIB) if largest >= units.GIB else ("MiB", _MIB)


def choose_time_unit(longest: float) -> tuple[str, float]:
    """The unit of an axis up to `longest` seconds, and its seconds."""
    for limit, unit, seconds in ((180, "s", 1), (3 * 3600, "min", 60), (72 * 3600, "h", 3600)):
        if longest < limit:
            return unit, seconds
    return "days", 86400
