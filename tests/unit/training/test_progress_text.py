"""The numbers and texts of the progress: speed, time left, and what fits on a line."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.training.callbacks.progress_text import (
    BarTexts,
    SpeedMeter,
    TrainingLength,
    fit_bar,
    format_duration,
    format_mean,
    format_metrics,
    format_speed,
    order_metrics,
    wrap_metrics,
)

NAMES = ["loss", "val_loss", "train_regression_mean_absolute_error", "validation_regression_root_mean_squared_error",
         "train_gradient_norm_of_the_encoder_part", "lr-AdamW/pg1"]  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def run_batches(meter: SpeedMeter, clock: Clock, *seconds: float, steps: int = 1) -> None:
    for each in seconds:
        meter.batch_begins()
        clock.time += each
        meter.batch_ends(steps)


def test_the_first_batch_and_pauses_do_not_count() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    meter.pause()  # the sanity check
    clock.time += 1000
    meter.batch_begins()
    assert (meter.recent(), meter.mean(), meter.seconds_left(TrainingLength(batches_left=3))) == (None, None, None)
    run_batches(meter, clock, 60)  # the warm-up
    assert (meter.recent(), meter.mean()) == (None, None)
    run_batches(meter, clock, 0.5, 0.5)
    meter.pause()
    meter.pause()  # a checkpoint during the validation
    clock.time += 1000
    run_batches(meter, clock, 0.5, 0.5)
    assert meter.recent() == pytest.approx(2.0)
    assert meter.mean() == pytest.approx(2.0)


def test_waiting_for_data_counts() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    run_batches(meter, clock, 1, 1)
    clock.time += 1
    run_batches(meter, clock, 1)
    assert meter.recent() == pytest.approx(2 / 3)


def test_a_pause_within_a_batch_leaves_out_that_batch() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    run_batches(meter, clock, 1, 1)
    meter.batch_begins()
    meter.pause()
    clock.time += 50
    meter.batch_ends(1)
    run_batches(meter, clock, 1)
    assert meter.mean() == pytest.approx(1.0)


def test_the_recent_speed_is_that_of_the_last_50_batches() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    run_batches(meter, clock, 1, *[0.1] * 100, *[0.5] * 50, steps=2)
    assert meter.recent() == pytest.approx(4.0)
    assert meter.mean() == pytest.approx(300 / 35)


@pytest.mark.parametrize(("steps", "batches", "seconds"), list(itertools.product([None, 0, 90], [None, 0, 40],
                                                                                [None, -1.0, 7.0])))  # fmt: skip
def test_the_time_left_is_that_of_the_first_limit(
    steps: int | None, batches: int | None, seconds: float | None
) -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    # 3 steps a batch, 0.5 s a batch.
    run_batches(meter, clock, 9, *[0.5] * 20, steps=3)
    limits = [None if steps is None else steps / 3 * 0.5, None if batches is None else batches * 0.5, seconds]
    left = meter.seconds_left(TrainingLength(None, steps, batches, seconds))
    known = [each for each in limits if each is not None]
    assert left == (pytest.approx(max(min(known), 0)) if known else None)


def test_the_time_left_includes_validations_and_checkpoints_to_come() -> None:
    clock = Clock()
    meter = SpeedMeter(clock)
    run_batches(meter, clock, 9, *[1.0] * 10)
    meter.pause()
    clock.time += 5
    meter.batch_begins()
    assert meter.seconds_left(TrainingLength(batches_left=20)) == pytest.approx(20 * 1.5)


def test_durations_and_speeds_have_three_digits() -> None:
    assert [format_duration(s) for s in (0, 59.6, 3661, 86399, 90061, 200000)] == [
        "0:00:00", "0:01:00", "1:01:01", "23:59:59", "1 day, 1:01:01", "2 days, 7:33:20"]  # fmt: skip
    assert [format_speed(s) for s in (1234.5, 99.94, 21, 1, 0.5, 0.001, 0)] == [
        "1234 steps/s", "99.9 steps/s", "21.0 steps/s", "1.00 steps/s", "2.00 s/step", "1000 s/step",
        "0 steps/s"]  # fmt: skip
    assert [format_mean(*pair) for pair in ((2, 0.5), (0.5, 0.25), (0.5, 2), (0.5, 0))] == [
        "(mean 0.500)", "(mean 4.00)", "(mean 0.500)", "(mean 0.00)"]  # fmt: skip


def test_metrics_of_the_bar_are_first_and_the_rest_follows_as_logged() -> None:
    in_bar, logged = {"val_loss": 2.0, "loss": 1.0}, {"a": 3.0, "loss": 1.0, "epoch": 0.0, "b": 4.0}
    assert list(order_metrics(in_bar, logged)[0]) == ["val_loss", "loss", "a", "b"]
    assert order_metrics(in_bar, logged, 3) == ({**in_bar, "a": 3.0}, 1)
    assert order_metrics(in_bar, logged, 1) == (in_bar, 2)
    assert order_metrics({}, logged)[0] == {"a": 3.0, "loss": 1.0, "b": 4.0}
    assert format_metrics({"a": 1.23456, "b": math.nan}, 2) == "a 1.235  b nan  and 2 more"


@given(st.lists(st.text("abc_/", min_size=1, max_size=200), unique=True, max_size=80), st.integers(0, 9))
def test_metrics_on_a_line_of_a_file_are_bounded_and_counted(names: list[str], hidden: int) -> None:
    line = format_metrics(dict.fromkeys(names, -1.234e-30), hidden)
    assert len(line) <= 160 + len("  and 89 more")
    shown = line.count(" -1.234e-30")
    assert bool(shown) == bool(names)
    assert line.endswith(f"and {hidden + len(names) - shown} more") or hidden + len(names) == shown


@pytest.mark.parametrize(("width", "lines"), list(itertools.product([1, 10, 24, 40, 80, 200], [1, 2, 4, 6])))
def test_metrics_never_exceed_the_screen_and_are_never_divided(width: int, lines: int) -> None:
    metrics = dict(zip(NAMES, (0.123456, -1.5e-9, math.inf, 12345678.0, 3.0, 1e-5), strict=True))
    found = wrap_metrics(metrics, width, lines)
    assert len(found) <= lines
    assert all(len(line) <= width for line in found)
    if width >= 60:
        items = [item for line in found for item in line.split("  ") if item]
        shown = [f"{name} {value:.4g}" for name, value in metrics.items()]
        hidden = len(metrics) - len([item for item in items if item.strip() in shown])
        assert [item.strip() for item in items] == [*shown[: len(metrics) - hidden],
                                                    *([f"and {hidden} more"] if hidden else [])]  # fmt: skip
        assert hidden == 0 or lines < 4


def test_all_six_long_metrics_are_on_80_columns() -> None:
    lines = wrap_metrics(dict.fromkeys(NAMES, 1.0), 80, 4)
    assert all(name in " ".join(lines) for name in NAMES)


def test_lines_do_not_move_when_values_change() -> None:
    def places(value: float) -> list[tuple[int, int]]:
        lines = wrap_metrics(dict.fromkeys(NAMES, value), 80, 4)
        return [(row, line.index(name)) for name in NAMES for row, line in enumerate(lines) if f"{name} " in line]

    assert places(1.0) == places(0.12345) == places(123456.7) == places(1.234e-05)


@given(st.text("abc", max_size=20), st.integers(1, 10**9), st.booleans(), st.integers(1, 200))
def test_a_bar_with_its_texts_has_the_width_of_the_terminal(name: str, count: int, has_speed: bool, width: int) -> None:
    speed = ("123 steps/s", "(mean 118)", "ETA 12:34:56") if has_speed else ("", "", "")
    texts = BarTexts(name, f"{count}/{count}", *speed)
    before, bar, after = fit_bar(texts, width)
    if bar:
        assert len(before) + bar + len(after) + 2 == width
        assert texts.count in after
    else:
        assert len(before) <= width
        assert after == ""


def test_what_does_not_fit_beside_the_bar_is_left_out_in_order() -> None:
    texts = BarTexts("Epoch 0/2", "12/32", "19.8 steps/s", "(mean 18.2)", "ETA 0:00:04")
    found = [fit_bar(texts, width)[2] for width in range(80, 15, -1)]
    assert list(dict.fromkeys(found)) == [
        "12/32  19.8 steps/s (mean 18.2)  ETA 0:00:04",
        "12/32  19.8 steps/s  ETA 0:00:04",
        "12/32  ETA 0:00:04",
        "12/32",
        "",
    ]
