"""`strategies.assessment`: which candidate is chosen, and the reasons."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.assessment import (
    MARGIN,
    TIE,
    Assessment,
    choose_fastest,
    choose_simplest,
    describe_speed,
    explain_pick,
    with_reason,
)
from strategies.memory import MemoryEstimate
from strategies.step_time import STEP_FLOOR, StepTime
from tests.unit.strategies.test_comparison import GIB, machine

GPUS, CPUS, ONE = machine(8), machine(8, "cpu"), machine(1)


def candidate(
    name: str, gib: float = 20, seconds: float = 1.0, *, eligible: bool = True, fits: bool = True, host: int = 0,
    ranks: int = 8,
) -> Assessment:  # fmt: skip
    memory = MemoryEstimate(int(gib * GIB), 0, 0, 0, 0, host, 0, "step", "traced")
    step = StepTime(seconds, 0, 0, 0, 0, 0, 0)
    return Assessment(name, memory, step, 4, 2, eligible, fits, "" if eligible else "cannot", ranks)


@pytest.mark.parametrize("slower", [-0.9 * TIE, 0, 0.9 * TIE])
def test_tie_goes_to_the_candidate_with_more_room_and_the_reason_says_so(slower: float) -> None:
    simple, roomy = candidate("simple", 60), candidate("roomy", 30, 1 + slower)
    pick = choose_fastest([simple, roomy], GPUS)
    assert pick is roomy
    assert explain_pick(roomy, [simple, roomy], GPUS) == (
        "needs 30 GiB of 80 GiB; as fast as simple (within 2%), and needs 30 GiB less"
    )
    assert with_reason(simple, roomy, GPUS, 1).reason == "fits; as fast as roomy (within 2%), but needs 30 GiB more"


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (candidate("other", 58), "other is as fast (within 2%), but needs only 2 GiB less"),
        (candidate("other", 70), "other is as fast (within 2%), but needs 10 GiB more"),
        (candidate("other", 60), "other is as fast (within 2%), but needs as much memory"),
        (candidate("other", 30, 1.5), "estimated 15.6 ms a sample, other 23.4 ms a sample"),
        (candidate("other", 30, 0.95), "other is estimated less than 10% faster, less than the error of the estimate"),
        # What leaves the device for the host is not saved.
        (candidate("other", 30, host=GIB), "other is as fast (within 2%), but needs 1 GiB outside of the device"),
    ],
)
def test_simpler_candidate_stays_without_a_tie_or_without_more_room(other: Assessment, part: str) -> None:
    simple = candidate("simple", 60)
    assert choose_fastest([simple, other], GPUS) is simple
    assert part in explain_pick(simple, [simple, other], GPUS)


def test_on_a_cpu_the_simplest_stays() -> None:
    both = [candidate("simple", 60), candidate("roomy", 1, 0.1)]
    assert choose_fastest(both, CPUS) is both[0]


candidates = st.lists(
    st.builds(
        candidate, st.sampled_from("abcdefgh"), st.floats(1, 70), st.floats(0.9, 1.2), host=st.sampled_from([0, GIB])
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda a: a.name,
)


@given(candidates)
def test_choice_differs_from_the_simplest_only_by_a_tie(able: list[Assessment]) -> None:
    simplest, pick = choose_simplest(able, GPUS), choose_fastest(able, GPUS)
    assert simplest is not None
    assert pick is not None
    assert all(a.step.seconds >= simplest.step.seconds * (1 - MARGIN) for a in able[able.index(simplest) + 1 :])
    if pick is not simplest:
        assert pick.memory.total < simplest.memory.total
        assert abs(pick.step.seconds - simplest.step.seconds) <= TIE * simplest.step.seconds


def test_candidates_with_other_samples_in_a_step_are_compared_per_sample() -> None:
    one, eight = candidate("one", seconds=0.5, ranks=1), candidate("eight", seconds=1.0)
    assert choose_fastest([one, eight], GPUS) is eight
    assert one.seconds_per_sample == 4 * eight.seconds_per_sample
    assert describe_speed(eight) == "15.6 ms a sample"


@pytest.mark.parametrize("seconds", [1e-9, STEP_FLOOR / 2, 0.99 * STEP_FLOOR])
def test_estimate_below_the_shortest_step_is_a_limit(seconds: float) -> None:
    assert describe_speed(candidate("a", seconds=seconds)) == "less than 0.00469 ms a sample"


@pytest.mark.parametrize(
    ("others", "ranks", "expected"),
    [
        ([candidate("b", fits=False)], GPUS, "needs 20 GiB of 80 GiB; nothing else fits"),
        ([candidate("b", eligible=False)], GPUS, "needs 20 GiB of 80 GiB; no other strategy can run here"),
        ([candidate("b", eligible=False)], ONE, "needs 20 GiB of 80 GiB"),
        (
            [candidate("b", eligible=False), candidate("c", fits=False)],
            ONE,
            "needs 20 GiB of 80 GiB; nothing else fits",
        ),
    ],
)
def test_nothing_else_fits_is_stated_only_if_something_else_was_tried(
    others: list[Assessment], ranks: object, expected: str
) -> None:
    pick = candidate("a")
    assert explain_pick(pick, [pick, *others], ranks) == expected  # type: ignore[arg-type]


def test_chosen_and_unable_candidates_have_their_reasons() -> None:
    pick = candidate("a")
    assert with_reason(pick, pick, GPUS, 1).reason == "chosen"
    assert with_reason(candidate("b", eligible=False), pick, GPUS, 1).reason == "cannot"
    slow = candidate("c", seconds=2)
    assert with_reason(slow, pick, GPUS, 1).reason == "fits; estimated 31.2 ms a sample, 2.0 times as long as a"
    near = candidate("d", seconds=1.1)
    assert with_reason(near, pick, GPUS, 1).reason.endswith("a sample, slower than a")
