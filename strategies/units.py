"""Bytes, durations, transfer rates and long lists as text."""

from __future__ import annotations

from collections.abc import Sequence

GIB = 1 << 30


def join_some(names: Sequence[str], limit: int = 8) -> str:
    """At most `limit` of the names, and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def format_bytes(size: int) -> str:
    """'1.5 GiB', '12.3 MiB'; binary units, as memory is sold and reported."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def format_rate(bytes_per_second: float) -> str:
    """'12.3 GB/s', '850 MB/s'; decimal units, as links are sold and measured."""
    unit, scale = ("GB/s", 1e9) if bytes_per_second >= 1e9 else ("MB/s", 1e6)
    return f"{bytes_per_second / scale:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """'350 ms', '12.4 s', '3 min 20 s', '2 h 05 min', '3 d 4 h'."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
