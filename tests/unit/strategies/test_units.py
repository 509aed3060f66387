"""Durations and rates as text."""

from __future__ import annotations

import pytest

from strategies.units import format_duration, format_rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (99.94, "99.9 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"),
     (7500, "2 h 05 min"), (76 * 3600, "3 d 4 h")],
)  # fmt: skip
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("rate", "text"), [(12.34e9, "12.3 GB/s"), (850e6, "850 MB/s")])
def test_format_rate_uses_decimal_units(rate: float, text: str) -> None:
    assert format_rate(rate) == text
