"""`launcher.monitoring.health`: times, memory and the loss of all ranks, and slow ranks."""

from __future__ import annotations

import pytest

from launcher.monitoring.health import Health, Limits
from launcher.monitoring.samples import RankSample
from tests.unit.monitoring.test_health import at, kinds, only


def times(*own: float, step: float = 1.0) -> list[RankSample]:
    return [RankSample(rank, step_seconds=step, own_seconds=value) for rank, value in enumerate(own)]


def test_times_and_memory_are_the_worst_of_the_ranks() -> None:
    samples = [RankSample(0, None, None, None, None, False, 0.5, 0.1, 0.2, 100),
               RankSample(1, None, None, None, None, False, 0.4, 0.3, 0.6, 900)]  # fmt: skip
    assert dict(at(samples).metrics) == {
        "perf/step_seconds": 0.5,
        "perf/data_seconds": 0.3,
        "perf/peak_memory_bytes": 900,
        "perf/slowest_rank": 1,
        "perf/slowest_factor": pytest.approx(3.0),
    }


def test_the_throughput_is_that_of_all_ranks_at_the_slowest_ones_step() -> None:
    samples = [RankSample(0, step_seconds=0.5, samples=8.0, tokens=64.0), RankSample(1, step_seconds=0.4, samples=6.0)]
    metrics = at(samples).metrics
    assert metrics["perf/samples_per_second"] == 28
    assert "perf/tokens_per_second" not in metrics, "one rank does not know its tokens"
    assert "perf/samples_per_second" not in at([RankSample(0, step_seconds=0.0, samples=8.0)]).metrics


def test_one_rank_is_not_compared_with_itself() -> None:
    health = at(times(0.5), before=Health(0, slow_rank=0))
    assert "perf/slowest_rank" not in health.metrics
    assert (health.alerts, health.slow_rank) == ((), None)


def test_a_rank_that_is_slow_for_many_steps_raises_an_alert() -> None:
    first = at(times(0.2, 0.2, 0.5), before=Health(5))
    assert (first.slow_rank, first.slow_since, kinds(first)) == (2, 5, [])
    second = at(times(0.2, 0.2, 0.5), step=24, before=first)
    assert (second.slow_rank, second.slow_since, kinds(second)) == (2, 5, [])
    third = at(times(0.256, 0.256, 0.768, step=2.0), step=25, before=second)
    assert (only(third).kind, only(third).title, only(third).ranks) == ("slow_rank", "rank 2 is slow", (2,))
    assert only(third).text == (
        "rank 2 needs 768 ms a step for data and forward pass, 3 times the others; all ranks wait for it during "
        "26% of each step"
    )


def test_a_slow_rank_does_not_reset_the_skipped_steps() -> None:
    slow = [
        RankSample(0, 8.0, 3, step_seconds=1.0, own_seconds=0.2),
        RankSample(1, 8.0, 3, None, None, False, 1.0, 0, 0.6),
    ]
    health = at(slow)
    assert (health.slow_rank, health.skipped_steps) == (1, 3)


def test_one_sample_of_many_steps_is_not_enough() -> None:
    first = at(times(0.2, 0.2, 0.5), step=100)
    assert (first.slow_rank, kinds(first)) == (2, [])
    assert kinds(at(times(0.2, 0.2, 0.5), step=101, before=first)) == ["slow_rank"]


def test_the_count_restarts_for_another_slow_rank_and_after_a_fast_sample() -> None:
    before = at(times(0.2, 0.2, 0.5), step=30)
    other = at(times(0.5, 0.2, 0.2), step=60, before=before)
    assert (other.slow_rank, other.slow_since, kinds(other)) == (0, 30, [])
    quick = at(times(0.2, 0.2, 0.2), step=60, before=before)
    assert (quick.slow_rank, quick.slow_since) == (None, 0)
    again = at(times(0.2, 0.2, 0.5), step=90, before=quick)
    assert (again.slow_since, kinds(again)) == (60, [])


@pytest.mark.parametrize(
    ("own", "step", "slow"),
    [((0.5, 0.75), 2.0, 1), ((0.5, 0.7), 2.0, None), ((0.5, 0.75), 2.1, None), ((0.0, 0.5), 2.0, None)],
    ids=["at both limits", "not much slower", "no great share of the step", "others too quick to compare"],
)
def test_a_slow_rank_exceeds_factor_and_share(own: tuple[float, ...], step: float, slow: int | None) -> None:
    assert at(times(*own, step=step), limits=Limits(slow_factor=1.5, slow_share=0.125)).slow_rank == slow


def test_a_loss_that_is_not_finite_is_reported_with_its_ranks() -> None:
    health = at([RankSample(0, loss_not_finite=True), RankSample(1), RankSample(2, loss_not_finite=True)])
    assert (only(health).kind, only(health).title, only(health).ranks) == (
        "loss_not_finite", "the loss is not finite", (0, 2)
    )  # fmt: skip
    assert only(health).text == "ranks 0, 2: check the batch, the learning rate and the precision"
