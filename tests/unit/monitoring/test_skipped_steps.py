"""Alerts about skipped steps, over trainings of a simulated `torch.amp.GradScaler`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from launcher.monitoring.health import Alert, Health, Limits, judge
from launcher.monitoring.samples import RankSample
from launcher.monitoring.skipped_steps import SkipCount, find_skipped_steps, recent_counts

_FP16_MAX = 65504.0
# Largest gradient of a step, before it is scaled.
Gradients = Callable[[int], float]


@dataclass(frozen=True)
class Scaler:
    initial: float = 65536.0
    growth_interval: int = 2000
    smallest: float = 0.0  # DeepSpeed's min_loss_scale

    def steps(self, gradients: Gradients, steps: int) -> Iterator[tuple[float, int]]:
        """The scale and the number of skipped steps after each step."""
        scale, skipped, good = self.initial, 0, 0
        for step in range(1, steps + 1):
            if scale * gradients(step) > _FP16_MAX:
                scale, skipped, good = max(scale / 2, self.smallest), skipped + 1, 0
            else:
                good += 1
                if good == self.growth_interval:
                    scale, good = scale * 2, 0
            yield scale, skipped


def alerts(
    scaler: Scaler, gradients: Gradients, steps: int, interval: int, ranks: int = 1, floor: float = 1.0
) -> list[tuple[int, Alert]]:
    """The alerts about skipped steps and their steps, each once per occurrence, as the monitor reports them."""
    health, found, is_raised = Health(0), list[tuple[int, Alert]](), False
    for step, (scale, skipped) in enumerate(scaler.steps(gradients, steps), 1):
        if step % interval == 0 or step == steps:
            samples = [RankSample(rank, scale, skipped, floor_steps=0) for rank in range(ranks)]
            health = judge(samples, step, health, Limits(floor))
            now = [alert for alert in health.alerts if alert.kind == "steps_skipped"]
            found += [(step, alert) for alert in now if not is_raised]
            is_raised = bool(now)
    return found


INTERVALS = (1, 5, 7, 10, 50, 120)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("initial", [1.0, 2.0**16, 2.0**32])
@pytest.mark.parametrize("fitting", [1.0, 2.0, 2.0**8, 2.0**15, 2.0**20])
def test_no_alert_while_the_scale_falls_to_one_that_fits(interval: int, initial: float, fitting: float) -> None:
    # The largest gradient does not overflow at this scale, and does at twice the scale, to which it grows once.
    found = alerts(Scaler(initial), lambda step: _FP16_MAX / fitting, 2500, interval)
    assert found == []


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("at", [1, 20, 49, 50, 51, 75, 100, 1000])
def test_no_alert_when_gradients_grow_once(interval: int, at: int) -> None:
    def gradients(step: int) -> float:
        return _FP16_MAX / (2.0**15 if step < at else 2.0)

    assert alerts(Scaler(), gradients, 3000, interval) == []


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
def test_no_alert_for_rare_bad_batches(interval: int, share: float) -> None:
    chosen = random.Random(0)  # noqa: S311 -- no secret
    bad = {step for step in range(1, 6000) if chosen.random() < share}
    # A short growth interval keeps the scale up.
    found = alerts(Scaler(growth_interval=10), lambda step: 1e30 if step in bad else 1e-3, 6000, interval)
    assert found == []


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_an_alert_soon_after_the_scale_falls_below_1(interval: int, every: int) -> None:
    """One step in `every` overflows at any scale: 17 overflows from 65536 to 0.5."""
    found = alerts(Scaler(), lambda step: 1e30 if step % every == 0 else 1e-3, 300, interval)
    below = 17 * every
    ((step, alert),) = found[:1]
    assert below <= step <= below + interval
    assert alert.kind == "steps_skipped"
    assert len(found) == 1, "one alert per occurrence"


@pytest.mark.parametrize("interval", [1, 5, 10, 20, 30])
def test_22_skipped_of_60_steps_raise_an_alert(interval: int) -> None:
    skipped = set(random.Random(1).sample(range(1, 61), 22))  # noqa: S311 -- no secret
    ((step, alert),) = alerts(Scaler(), lambda step: 1e30 if step in skipped else 1e-3, 60, interval)
    assert step <= 60
    assert alert.ranks == (0,)
    assert "of the last" in alert.text
    assert "below 1:" in alert.text


def test_the_text_states_the_share_the_scale_and_what_to_do() -> None:
    skipped = {*range(1, 11), *range(48, 60)}
    ((step, alert),) = alerts(Scaler(), lambda step: 1e30 if step in skipped else 1e-3, 60, 60, ranks=2)
    assert step == 60
    assert (alert.title, alert.ranks) == ("many optimizer steps are skipped", (0, 1))
    assert alert.text == (
        "22 of the last 60 steps were skipped, and the loss scale of ranks 0, 1 fell to 0.0156, below 1: gradients "
        "overflow even if the loss is not scaled up; lower the learning rate, clip the gradients, check for an "
        "infinite loss, or train in bf16-mixed"
    )


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize(("every", "scaler"), [(4, Scaler(growth_interval=2)), (2, Scaler(growth_interval=1)),
                                                (3, Scaler(smallest=1.0))])  # fmt: skip
def test_an_alert_where_steps_are_skipped_while_the_scale_stays_up(interval: int, every: int, scaler: Scaler) -> None:
    ((step, alert),) = alerts(scaler, lambda step: 1e30 if step % every == 0 else 1e-3, 1000, interval)
    assert 100 <= step <= 100 + 2 * interval
    assert alert.text.startswith(f"{step // every} of the last {step} steps were skipped, and these batches are lost;")


def test_the_floor_is_a_setting() -> None:
    gradients: Gradients = lambda step: 1e30 if step <= 24 else 1e-3  # noqa: E731 -- as in the tests above
    assert alerts(Scaler(), gradients, 100, 10) != []
    assert alerts(Scaler(), gradients, 100, 10, floor=1e-4) == []


def test_an_alert_of_a_collapsed_scale_is_the_only_one() -> None:
    health = judge([RankSample(0, 0.0, 40, floor_steps=10)], 50, Health(0), Limits())
    assert [alert.kind for alert in health.alerts] == ["scale_underflow"]


def test_steps_skipped_before_a_resume_do_not_count() -> None:
    first = judge([RankSample(0, 0.5, 400)], 1010, Health(1000), Limits())
    second = judge([RankSample(0, 0.5, 404)], 1020, first, Limits())
    third = judge([RankSample(0, 0.5, 405)], 1030, second, Limits())
    assert [[a.kind for a in each.alerts] for each in (first, second, third)] == [[], [], ["steps_skipped"]]


def test_only_the_counts_of_two_windows_are_kept() -> None:
    for interval, kept in itertools.product(INTERVALS, (0, 3, 400)):
        counts: Sequence[SkipCount] = [SkipCount(0, 0)]
        everything = [SkipCount(0, 0)]
        for step in range(interval, 1200, interval):
            everything.append(SkipCount(step, step // 4 if step > kept else 0))
            counts = [*counts, everything[-1]]
            assert find_skipped_steps(counts, 8.0, 1.0) == find_skipped_steps(everything, 8.0, 1.0)
            counts = recent_counts(counts)
            assert len(counts) <= 2 * 50 // interval + 3
