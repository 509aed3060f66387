"""Numbers as people read them."""

from __future__ import annotations

import math
import time

from strategies.units import GIB, format_bytes, format_duration

_MIB = 2**20


def number(value: float | None, digits: int = 4) -> str:
    """'2.346', '1.2e-05', 'not finite'; a dash for None."""
    if value is None:
        return "\u2013"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def count(value: float | None) -> str:
    """A whole number with separators; a dash for None."""
    return "\u2013" if value is None else f"{int(value):,}"


def many(value: int, noun: str) -> str:
    """'1 step', '2 steps'."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """As `format_duration`; a dash for None or NaN."""
    return "\u2013" if seconds is None or not math.isfinite(seconds) else format_duration(seconds)


def milliseconds(seconds: float | None) -> str:
    """'12.4' of 0.0124 seconds; a dash for None or NaN."""
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    shown = seconds * 1e3
    return f"{shown:,.0f}" if shown >= 100 else f"{shown:.3g}"


def size(amount: float | None) -> str:
    """As `format_bytes`; a dash for None."""
    return "\u2013" if amount is None else format_bytes(int(amount))


def size_unit(largest: float) -> tuple[str, float]:
    """The unit for a plot up to `largest` bytes, and its bytes."""
    return ("GiB", GIB) if largest >= GIB else ("MiB", _MIB)


def moment(seconds: float) -> str:
    """'2026-11-25 01:44:31', in the reader's own zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return number(seconds)


def time_unit(longest: float) -> tuple[str, float]:
    """The unit for an axis up to `longest` seconds, and its seconds."""
    if longest < 180:
        return "s", 1
    if longest < 3 * 3600:
        return "min", 60
    if longest < 72 * 3600:
        return "h", 3600
    return "days", 86400
