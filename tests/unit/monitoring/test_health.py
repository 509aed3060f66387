"""`launcher.monitoring.health`: metrics and alerts from the samples of all ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.monitoring.health import Alert, Health, Limits, find_broken_losses, judge
from launcher.monitoring.samples import RankSample

LIMITS = Limits(floor=1.0, floor_steps=10, slow_factor=1.5, slow_share=0.1, slow_steps=20)


def scales(*values: float | None) -> list[RankSample]:
    return [RankSample(rank, value) for rank, value in enumerate(values)]


def at(samples: Sequence[RankSample], step: int = 10, before: Health | None = None, limits: Limits = LIMITS) -> Health:
    return judge(samples, step, before or Health(0), limits)


def kinds(health: Health) -> list[str]:
    return [alert.kind for alert in health.alerts]


def only(health: Health) -> Alert:
    (alert,) = health.alerts
    return alert


# The scale.


def test_the_scale_of_all_ranks_is_one_row() -> None:
    samples = [RankSample(0, 1024.0, 3, 7, 0), RankSample(1, 1024.0, 2, 5, 0)]
    metrics = at(samples).metrics
    assert {name: value for name, value in metrics.items() if name.startswith("amp/")} == {
        "amp/loss_scale": 1024.0,
        "amp/loss_scale_min": 1024.0,
        "amp/loss_scale_max": 1024.0,
        "amp/ranks_diverged": 0,
        "amp/overflow": False,
        "amp/underflow": False,
        "amp/floor_steps": 0,
        "amp/growth_tracker": 5,
        "amp/skipped_steps": 3,
        "amp/skip_rate": 0.3,
    }
    assert at(samples).alerts == ()


def test_a_rank_whose_scale_cannot_be_read_has_not_diverged_and_one_without_a_scale_has() -> None:
    unknown = RankSample(1, scale_unknown=True)
    assert kinds(at([RankSample(0, 8.0), unknown, RankSample(2, 8.0)])) == []
    assert only(at([RankSample(0, 8.0), RankSample(1), RankSample(2, 8.0)])).ranks == (1,)


@pytest.mark.case(38)
def test_without_a_scale_there_is_no_scale_key() -> None:
    metrics = at(scales(None, None)).metrics
    assert [name for name in metrics if name.startswith("amp/")] == []


@pytest.mark.case(12)
def test_a_scale_of_0_is_logged_and_flagged_as_underflow() -> None:
    health = at(scales(0.0))
    assert (health.metrics["amp/loss_scale"], type(health.metrics["amp/loss_scale"])) == (0.0, float)
    assert (health.metrics["amp/underflow"], health.metrics["amp/overflow"]) == (True, False)
    assert (only(health).kind, only(health).title, only(health).ranks) == (
        "scale_underflow", "the loss scale is 0", (0,)
    )  # fmt: skip
    assert only(health).text == (
        "rank 0: every gradient overflowed until the scale reached 0; check for an infinite loss, or train in "
        "bf16-mixed"
    )


@pytest.mark.case(13)
@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_flagged_as_overflow(scale: float) -> None:
    health = at(scales(8.0, scale, scale))
    assert (health.metrics["amp/overflow"], health.metrics["amp/underflow"]) == (True, False)
    assert kinds(health) == ["scale_not_finite", "ranks_diverged"]
    assert health.alerts[0].ranks == (1, 2)
    assert health.alerts[0].title == "the loss scale is not finite"
    assert health.alerts[0].text == (
        "ranks 1, 2: no gradient is finite, and the model no longer learns; resume from an earlier checkpoint, with "
        "bf16-mixed if the device supports it, or with a lower learning rate"
    )


def test_a_nan_of_any_rank_is_in_minimum_and_maximum() -> None:
    for order in ((math.nan, 8.0), (8.0, math.nan)):
        metrics = at(scales(*order)).metrics
        assert math.isnan(metrics["amp/loss_scale_min"])
        assert math.isnan(metrics["amp/loss_scale_max"])


def test_ranks_that_are_all_nan_do_not_differ() -> None:
    # As from the ranks: different objects.
    health = at(scales(float("nan"), float("nan")))
    assert health.metrics["amp/ranks_diverged"] == 0
    assert kinds(health) == ["scale_not_finite"]


@pytest.mark.case(40)
@pytest.mark.parametrize(
    ("values", "apart", "text"),
    [
        ((8.0, 8.0, 4.0), (2,), "rank 0 has 8.0; rank 2: 4.0: "),
        ((4.0, 8.0, 8.0), (0,), "rank 0 has 4.0; rank 0: 4.0: "),
        ((8.0, 4.0), (1,), "rank 0 has 8.0; rank 1: 4.0: "),
        ((8.0, 4.0, 2.0, 2.0), (0, 1), "rank 0 has 8.0; rank 0: 8.0, rank 1: 4.0: "),
        ((8.0, None), (1,), "rank 0 has 8.0; rank 1: None: "),
    ],
)
def test_ranks_that_differ_from_most_are_named(
    values: tuple[float | None, ...], apart: tuple[int, ...], text: str
) -> None:
    health = at(scales(*values))
    assert health.metrics["amp/ranks_diverged"] == 1
    assert (only(health).kind, only(health).ranks) == ("ranks_diverged", apart)
    assert only(health).title == "the ranks' loss scales differ"
    assert only(health).text == text + (
        "the ranks no longer skip the same steps, and their weights differ; check that every rank reduces the same "
        "gradients"
    )


def test_many_ranks_that_differ_are_named_in_the_record_and_few_in_the_text() -> None:
    health = at(scales(*[8.0] * 20, *[float(2**n) for n in range(4, 14)]))
    assert only(health).ranks == tuple(range(20, 30))
    assert "rank 27: 2048.0:" in only(health).text
    assert "rank 28" not in only(health).text


def test_many_broken_ranks_are_counted() -> None:
    assert only(at(scales(*[math.inf] * 8))).text.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7: ")
    health = at(scales(*[math.inf] * 10))
    assert only(health).ranks == tuple(range(10))
    assert only(health).text.startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more: ")


def test_rank_zeros_missing_scale_is_no_key_while_the_others_are_logged() -> None:
    metrics = at(scales(None, 8.0, 2.0)).metrics
    assert "amp/loss_scale" not in metrics
    assert (metrics["amp/loss_scale_min"], metrics["amp/loss_scale_max"]) == (2.0, 8.0)


# The floor.


def test_steps_at_the_floor_are_the_scalers_count_if_it_has_one() -> None:
    health = at([RankSample(0, 1.0, floor_steps=9), RankSample(1, 1.0, floor_steps=10)])
    assert (health.metrics["amp/floor_steps"], dict(health.floor_steps)) == (10, {0: 9, 1: 10})
    assert (only(health).kind, only(health).title, only(health).ranks) == (
        "scale_at_floor", "the loss scale stays at its floor", (1,)
    )  # fmt: skip
    assert only(health).text == (
        "rank 1: at or below 1 for 10 steps in a row; gradients overflow at any scale: check for an infinite loss, "
        "lower the learning rate, clip the gradients, or train in bf16-mixed"
    )


def test_without_a_count_a_scale_at_the_floor_counts_since_the_last_sample() -> None:
    first = at(scales(1.0, 2.0), step=6)
    assert (dict(first.floor_steps), kinds(first)) == ({0: 6, 1: 0}, ["ranks_diverged"])
    second = at(scales(1.0, 0.5), step=10, before=first)
    assert dict(second.floor_steps) == {0: 10, 1: 4}
    assert kinds(second)[0] == "scale_at_floor"
    assert dict(at(scales(1.5, None), step=12, before=second).floor_steps) == {0: 0, 1: 0}


def test_a_scale_of_0_is_reported_as_underflow_and_not_as_the_floor() -> None:
    assert kinds(at([RankSample(0, 0.0, floor_steps=50)])) == ["scale_underflow"]


def test_the_longest_time_at_the_floor_is_reported() -> None:
    health = at([RankSample(0, 1.0, floor_steps=12), RankSample(1, 1.0, floor_steps=40)])
    assert "ranks 0, 1: at or below 1 for 40 steps" in only(health).text


# Skipped steps.


@pytest.mark.parametrize(
    ("step", "before", "rate"),
    [
        (10, Health(0), 0.4),
        (10, Health(8, skipped_steps=3), 0.5),
        (10, Health(8, skipped_steps=4), 0.0),
        (10, Health(8, skipped_steps=9), 0.0),
        (10, Health(8), 0.0),
        (10, Health(10, skipped_steps=3), 1.0),
    ],
    ids=[
        "from the beginning",
        "since the last look",
        "none",
        "a new scaler",
        "after a resume",
        "same step",
    ],
)
def test_the_skip_rate_is_that_of_the_steps_since_the_last_sample(step: int, before: Health, rate: float) -> None:
    health = judge([RankSample(0, 8.0, 4), RankSample(1, 8.0, None)], step, before, LIMITS)
    assert (health.metrics["amp/skipped_steps"], health.metrics["amp/skip_rate"]) == (4, rate)
    assert health.skipped_steps == 4


def test_what_no_rank_counts_is_not_logged() -> None:
    metrics = at(scales(8.0)).metrics
    assert {"amp/skipped_steps", "amp/skip_rate", "amp/growth_tracker"} & set(metrics) == set()
    assert at(scales(8.0)).skipped_steps is None


SAMPLES = st.lists(
    st.builds(
        RankSample,
        rank=st.just(0),
        scale=st.none() | st.sampled_from([0.0, 1.0, 8.0, math.inf, math.nan]),
        skipped_steps=st.none() | st.integers(0, 9),
        floor_steps=st.none() | st.integers(0, 20),
        loss_not_finite=st.booleans(),
        own_seconds=st.sampled_from([0.0, 0.1, 0.5]),
        step_seconds=st.sampled_from([0.5, 1.0]),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.randoms())
def test_the_order_of_samples_does_not_matter(drawn: list[RankSample], chance: random.Random) -> None:
    samples = [RankSample(rank, s.scale, s.skipped_steps, None, s.floor_steps, s.loss_not_finite, s.step_seconds, 0.0,
                          s.own_seconds) for rank, s in enumerate(drawn)]  # fmt: skip
    health = at(samples)
    shuffled = list(samples)
    chance.shuffle(shuffled)
    assert repr(at(shuffled)) == repr(health)
    assert ("amp/loss_scale" in health.metrics) == (samples[0].scale is not None)
    assert all(0 <= rank < len(samples) for alert in health.alerts for rank in alert.ranks)
    assert len(set(kinds(health))) == len(kinds(health))


@pytest.mark.parametrize(
    ("name", "is_training_loss"),
    [
        *((name, True) for name in ("loss", "train_loss", "loss_epoch", "train/loss", "g_loss", "trainLoss", "Loss-D")),
        *((name, False) for name in ("val_loss", "valLoss", "test/loss", "best_loss", "acc", "lossy", "perplexity")),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
def test_logged_training_losses_that_are_not_finite_are_found(name: str, is_training_loss: bool, value: float) -> None:
    found = find_broken_losses({name: value, "other": math.nan})
    assert found == ([name] if is_training_loss and not math.isfinite(value) else [])
