"""The axes of the report's plots."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.ticker import MaxNLocator

from launcher.report.drawing import Plot, _NumberFormatter
from launcher.report.plots import Curve, CurveAxes, draw_curves
from launcher.report.series import Line

RANGES = [(0.00099, 0.001), (0.00099999, 0.001), (1e-5, 2e-5), (0, 1), (1e-7, 1e-7), (1234567.5, 1234567.9), (-3, 2.5),
          (0, 164), (0, 99999), (900, 1100)]  # fmt: skip


def _draw(low: float, high: float, *, is_small: bool) -> Plot:
    line = Line(np.array([1.0, 20.0, 30.0, 40.0]), np.array([high, (low + high) / 2, low, low]))
    unit = "" if is_small else "learning rate"
    return draw_curves(CurveAxes("rate", "Rate", unit, 1.9, is_small=is_small), [Curve("", [line])])


def _find_left_labels(svg: str) -> list[tuple[float, str]]:
    """The right edge and the text of each label of the vertical axis."""
    found = re.findall(r'text-anchor: end[^"]*" x="([0-9.]+)"[^>]*>([^<]*)</text>', svg)
    return [(float(edge), text) for edge, text in found]


@pytest.mark.parametrize("steps", [[1], [5, 6], [1, 2, 4], [7, 400]])
def test_no_label_of_the_steps_is_repeated(steps: list[int]) -> None:
    line = Line(np.array(steps, dtype=float), np.ones(len(steps)))
    for svg in draw_curves(CurveAxes("loss", "Loss", "loss"), [Curve("", [line])]).svg.split("<svg ")[1:]:
        labels = re.findall(r"text-anchor: middle[^>]*>([0-9,.]+)</text>", svg)
        assert labels
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("counts", [(5,), (31,), (60,), (61,), (200,), (61, 60), (100, 5), (60, 60)])
def test_a_trend_is_named_only_if_it_differs_from_the_values(counts: tuple[int, ...]) -> None:
    # Each attempt does the last ten steps of the one before again.
    starts = np.cumsum([0, *(count - 10 for count in counts)])
    lines = [
        Line(np.arange(start, start + count, dtype=float), np.resize([1.0, 2.0], count))
        for start, count in zip(starts, counts, strict=False)
    ]
    curve = Curve("loss", lines, trend=True)
    with_trend, without = (
        draw_curves(CurveAxes("loss", "Loss", "loss"), [each]).svg.count("<path")
        for each in (curve, Curve("loss", lines))
    )
    assert curve.has_trend == (with_trend > without)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_labels_on_the_left_are_complete_and_beside_the_label_of_the_axis(
    low: float, high: float, is_small: bool
) -> None:
    plot = _draw(low, high, is_small=is_small)
    for svg in plot.svg.split("<svg ")[1:]:
        labels = _find_left_labels(svg)
        assert len(labels) >= 2, svg
        numbers = [float(text) for _, text in labels]
        assert len(set(numbers)) == len(numbers), "each tick has its own label"
        # 0.636 em is the width of a digit of the widest usual font; the label of the axis ends at 0.2 inches.
        start = min(edge - 10.5 * (0.636 * len(re.sub("[.e-]", "", text)) + 0.4) for edge, text in labels)
        assert start >= (0 if is_small else 0.2 * 72)
        texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", svg)) - {"optimizer step", "learning rate"}
        assert all(re.fullmatch(r"-?[0-9.]+(e[-+][0-9]+)?", text) for text in texts), "no offset above the axis"


@given(st.floats(1, 9e5), st.floats(0.01, 1))
def test_labels_of_usual_numbers_have_no_exponent(high: float, share: float) -> None:
    ticks = MaxNLocator().tick_values(high * (1 - share), high)
    labels = _NumberFormatter().format_ticks(ticks)
    assert not any("e" in label for label in labels if 1e-4 <= abs(float(label)) < 1e6), labels
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(list(ticks), abs=0.02 * (ticks[1] - ticks[0]))
