"""The numbers behind the plots."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import WatchOptions
from launcher.report.history import read_history
from launcher.report.records import RankTable
from launcher.report.series import (
    Line,
    Skip,
    count_skipped_steps,
    decimate,
    find_skips,
    find_stragglers,
    group_equal,
    smooth,
    smooth_by_medians,
    summarize_ranks,
)
from launcher.report.units import format_ranks
from tests.support.made_run import START


def line(values: Any) -> Line:
    return Line(np.arange(len(values), dtype=float), np.array(values, dtype=float))


def table(skipped: list[float | None], steps: list[int] | None = None) -> RankTable:
    nothing = np.full((len(skipped), 1), np.nan)
    counts = np.array([[s] for s in skipped], dtype=float)
    at = np.array(steps or range(10, 10 * len(skipped) + 1, 10), dtype=float)
    return RankTable(at, (0,), nothing, counts, nothing, nothing, nothing)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(10, 100))
def test_decimation_keeps_ends_extremes_and_order(values: list[float], limit: int) -> None:
    thin = decimate(line(values), limit)
    assert len(thin.steps) <= max(limit, 1) + 2
    assert (np.diff(thin.steps) > 0).all()
    assert thin.values.min() == min(values)
    assert thin.values.max() == max(values)
    assert (thin.steps[0], thin.steps[-1]) == (0, len(values) - 1)


def test_decimation_keeps_one_spike_in_100_000_points() -> None:
    values = np.zeros(100_000)
    values[54_321] = 1
    thin = decimate(line(values))
    assert thin.steps[thin.values == 1].tolist() == [54_321]


def test_a_trend_starts_without_bias_and_skips_values_that_are_not_finite() -> None:
    assert np.allclose(smooth(line([5.0] * 100)).values, 5)
    trend = smooth(line([5.0, math.nan, math.inf, 5.0] * 30))
    assert np.allclose(trend.values, 5)


def test_the_trend_of_times_ignores_an_outlier() -> None:
    trend = smooth_by_medians(line([10_000.0, *[1.0] * 99]), blocks=10)
    assert trend.values.tolist() == [1.0] * 10


def test_skipped_steps_are_found_in_their_intervals() -> None:
    assert find_skips(table([0, 2, 2, 3]), 0) == [Skip(10, 20, 2), Skip(30, 40, 1)]
    assert find_skips(table([1]), None) == [Skip(0, 10, 1)]
    assert find_skips(table([None, 2, None, 4]), 0) == [Skip(0, 20, 2), Skip(20, 40, 2)]
    assert find_skips(table([None, None]), 0) == []


def test_the_first_count_of_a_resumed_run_is_not_a_new_skip() -> None:
    assert find_skips(table([7, 8], [110, 120]), 100) == [Skip(110, 120, 1)]


def test_ranks_with_the_same_scale_are_one_line() -> None:
    groups = group_equal(
        {0: np.array([2.0, np.nan]), 1: np.array([2.0, 1.0]), 2: np.array([2.0, np.nan]), 3: np.array([4.0, 1])}
    )
    assert groups == [(0, 2), (1,), (3,)]


@pytest.mark.parametrize(
    ("ranks", "name"),
    [([0], "rank 0"), ([1, 0], "ranks 0\u20131"), ([0, 1, 2, 5, 7, 8], "ranks 0\u20132, 5, 7\u20138")],
)
def test_ranks_are_named_in_spans(ranks: list[int], name: str) -> None:
    assert format_ranks(ranks) == name


def _interval(step: int, own: list[float], data: float = 0.0, skipped: int | None = None) -> dict[str, Any]:
    size = len(own)
    return {
        "time": START + step, "rank": 0, "kind": "ranks", "step": step, "ranks": list(range(size)), "own_seconds": own,
        "step_seconds": [1.0] * size, "data_seconds": [data] * size, "skipped_steps": [skipped] * size,
    }  # fmt: skip


def test_stragglers_are_found_by_the_rule_of_the_alerts() -> None:
    # The first interval, with its warm-up, must not count.
    later = (_interval(step, [0.2, 0.2, 0.5], 0.1, 4) for step in range(2, 9))
    history = read_history([_interval(1, [9.0, 0.2, 0.2]), *later])
    summaries = summarize_ranks(history)
    assert [s.rank for s in summaries] == [0, 1, 2]
    slow = summaries[2]
    assert (slow.own_seconds, slow.own_factor, slow.share_slowest) == (0.5, 2.5, 7 / 8)
    assert (slow.skipped_steps, slow.data_seconds) == (4, 0.1)
    assert count_skipped_steps(history) == 4
    assert find_stragglers(summaries, WatchOptions()) == [2]
    assert find_stragglers(summaries, WatchOptions(slow_factor=3)) == []
    assert find_stragglers(summaries, WatchOptions(slow_share=0.5)) == []


def test_a_single_rank_is_not_compared() -> None:
    (alone,) = summarize_ranks(read_history([_interval(1, [0.5])]))
    assert math.isnan(alone.own_factor)
    assert find_stragglers([alone], WatchOptions()) == []
