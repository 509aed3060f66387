"""Bytes and seconds as text."""

from __future__ import annotations

GIB = 1 << 30


def format_bytes(size: int) -> str:
    """Bytes as text: '1.50 GiB', '12.3 MiB'."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def format_seconds(value: float) -> str:
    """Seconds as text: '1.5 s', '230 ms'."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
