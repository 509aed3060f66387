"""`checkpoint.every: auto`: the interval from cost and failures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.checkpoint.save_interval import (
    LONGEST,
    PRIOR_DEVICE_HOURS,
    FailureHistory,
    best_interval,
    choose_interval,
    describe_auto,
    read_failures,
)

DAY = 86_400.0
ANY = 10**9  # an interval before that limits nothing


def _lost(interval: float, cost: float, mean_time: float) -> float:
    """Daly's exact run time for each second of work: exponential failures, restart at once."""
    return mean_time * math.expm1((interval + cost) / mean_time) / interval


@pytest.mark.parametrize("cost", [0.1, 5.0, 60.0, 600.0])
@pytest.mark.parametrize("mean_time", [DAY / 24, DAY, 30 * DAY])
def test_no_other_interval_loses_clearly_less(cost: float, mean_time: float) -> None:
    best = best_interval(cost, mean_time)
    grid = [best * 1.02**n for n in range(-300, 300)]
    assert _lost(best, cost, mean_time) <= min(_lost(t, cost, mean_time) for t in grid) * 1.0005


def test_the_first_term_is_youngs_and_a_cost_beyond_reason_saves_once_a_failure() -> None:
    assert best_interval(1e-6, DAY) == pytest.approx(math.sqrt(2e-6 * DAY), rel=1e-3)
    assert best_interval(10.0, 5.0) == 5.0


def test_the_prior_is_one_failure_of_the_published_rate() -> None:
    # 419 failures in 54 days: one in about 3 hours on 16,384 devices.
    assert FailureHistory(0, 0.0, 16_384).mean_time == pytest.approx(54 * DAY / 419)
    assert FailureHistory(0, 0.0, 1).mean_time == pytest.approx(3600 * PRIOR_DEVICE_HOURS)
    assert FailureHistory(2, 5.0, 16_384).mean_time == pytest.approx((54 * DAY / 419 + 5 * 3600) / 3)


def test_more_failures_save_more_often_and_cheaper_saves_too() -> None:
    def seconds(cost: float, failures: int, devices: int = 4096) -> float:
        return choose_interval(cost, cost, 0.5, FailureHistory(failures, 10.0, devices), ANY).seconds

    assert seconds(2.0, 10) < seconds(2.0, 0)
    assert seconds(1.0, 10) < seconds(4.0, 10)
    assert seconds(2.0, 3, 16_384) < seconds(2.0, 3, 1024)


@pytest.mark.parametrize(
    ("cost", "write", "history", "expected", "why"),
    [
        (1.0, 1.0, FailureHistory(0, 0.0, 8), LONGEST, ", the longest"),
        (300.0, 300.0, FailureHistory(0, 0.0, 8), 3000.0, ", the least between two saves"),
        (1.0, 40.0, FailureHistory(500, 1.0, 16_384), 40.0, ", the least between two saves"),
        (30.0, 30.0, FailureHistory(9, 90.0, 16_384), best_interval(30.0, (54 * DAY / 419 + 90 * 3600) / 10), ""),
    ],
)
def test_the_bounds(cost: float, write: float, history: FailureHistory, expected: float, why: str) -> None:
    decision = choose_interval(cost, write, 0.5, history, ANY)
    assert decision.steps == round(expected / 0.5)
    assert decision.seconds == pytest.approx(expected, abs=0.5)
    assert decision.reason.endswith(f"s{why}")


def test_the_interval_grows_four_fold_at_most_and_is_never_zero() -> None:
    history = FailureHistory(0, 0.0, 8)
    assert choose_interval(1.0, 1.0, 0.1, history, before=10).steps == 40
    assert choose_interval(1.0, 1.0, 0.1, history, before=10).reason.endswith(", at most 4 times the interval before")
    assert choose_interval(1.0, 1.0, 0.1, history, before=18_000).steps == 18_000
    assert choose_interval(0.001, 0.001, 9999.0, history, ANY).steps == 1


def _event(kind: str, hour: float, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": 1e9 + 3600 * hour, "rank": 0, **fields}


def test_failures_are_attempts_that_neither_finished_nor_were_stopped() -> None:
    events = [
        _event("run_started", 0), _event("training_started", 1), _event("step", 3), _event("rank_failed", 3),
        _event("run_started", 4), _event("training_started", 5), _event("step", 6), _event("interrupted", 6),
        # A lost node writes nothing.
        _event("run_started", 7), _event("training_started", 7), _event("step", 8),
        _event("run_started", 9), _event("training_started", 9), {"kind": "step", "time": "damaged"},
    ]  # fmt: skip
    assert read_failures(events, 4) == FailureHistory(2, 4.0, 4)
    assert read_failures([], 4) == FailureHistory(0, 0.0, 4)


def test_the_plan_names_the_assumption() -> None:
    assert describe_auto(16_384)[0].endswith("at first one failure each 3.09 h is assumed")
