"""`launcher.step_clock`: how long steps take, and how much of that is a rank's own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import step_clock
from launcher.step_clock import StepClock, StepTimes


class Hand:
    """A clock that is set by hand, in whole seconds."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def clock(hand: Hand) -> StepClock:
    return StepClock(hand)


@pytest.fixture
def batch(hand: Hand, clock: StepClock) -> Callable[..., None]:
    """One batch: data is waited for, then the forward and the backward pass."""

    def run(data: float, forward: float, backward: float, device: Any = None) -> None:
        hand.time += data
        clock.batch_begins(device)
        hand.time += forward
        clock.backward_begins()
        hand.time += backward
        clock.batch_ends()

    return run


def test_means_over_the_steps_since_the_last_reading(clock: StepClock, batch: Callable[..., None]) -> None:
    batch(100, 2, 8)
    batch(4, 2, 8)
    # The wait before the very first batch is the start of the training.
    assert clock.read(2) == StepTimes(step=24 / 2, data=4 / 2, own=8 / 2)


def test_a_reading_begins_anew_but_the_wait_for_data_goes_on(clock: StepClock, batch: Callable[..., None]) -> None:
    batch(0, 1, 1)
    clock.read(1)
    batch(3, 1, 1)
    assert clock.read(1) == StepTimes(step=5, data=3, own=4)
    assert clock.read(1) == StepTimes(0, 0, 0)


def test_accumulated_batches_are_one_step(clock: StepClock, batch: Callable[..., None]) -> None:
    batch(0, 1, 1)
    batch(1, 1, 1)
    assert clock.read(1) == StepTimes(step=5, data=1, own=3)


def test_no_step_is_no_division_by_zero(clock: StepClock, batch: Callable[..., None]) -> None:
    batch(0, 1, 1)
    assert clock.read(0) == StepTimes(step=2, data=0, own=1)


def test_a_pause_is_no_part_of_a_step(hand: Hand, clock: StepClock, batch: Callable[..., None]) -> None:
    batch(0, 1, 1)
    clock.pause()
    hand.time += 1000
    batch(7, 1, 1)
    batch(2, 1, 1)
    assert clock.read(3) == StepTimes(step=8 / 3, data=2 / 3, own=5 / 3)


def test_several_backward_passes_of_a_batch_are_timed_to_the_last(hand: Hand, clock: StepClock) -> None:
    clock.batch_begins()
    hand.time += 1
    clock.backward_begins()
    hand.time += 1
    clock.backward_begins()
    clock.batch_ends()
    assert clock.read(1) == StepTimes(step=2, data=0, own=3)


def test_an_end_or_a_backward_pass_without_a_begin_counts_nothing(hand: Hand, clock: StepClock) -> None:
    hand.time = 5
    clock.backward_begins()
    clock.batch_ends()
    assert clock.read(1) == StepTimes(0, 0, 0)


def test_a_clock_that_was_never_told_anything_reads_zero() -> None:
    assert StepClock().read(5) == StepTimes()


class Event:
    """As a CUDA event: over when its time has come."""

    def __init__(self, hand: Hand) -> None:
        self.at = hand.time
        self.over = True

    def query(self) -> bool:
        return self.over

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def test_on_a_cuda_device_the_forward_pass_is_read_one_interval_later(
    hand: Hand, clock: StepClock, batch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Event] = []

    def event(device: Any) -> tuple[Event, Any]:
        made.append(Event(hand))
        return made[-1], device

    monkeypatch.setattr(step_clock, "_event", event)
    cuda = SimpleNamespace(type="cuda")
    batch(0, 3, 1, cuda)
    batch(1, 3, 1, cuda)
    assert clock.read(2) == StepTimes(step=9 / 2, data=1 / 2, own=1 / 2)
    batch(1, 5, 1, cuda)
    assert clock.read(1) == StepTimes(step=7, data=1, own=1 + 6)
    # What is still in the device's queue is left out, and nobody waits for it.
    made[-1].over = False
    assert clock.read(1) == StepTimes(0, 0, 0)
    assert clock.read(1) == StepTimes(0, 0, 0)


@pytest.mark.parametrize("device", [None, "cuda", SimpleNamespace(type="cpu"), SimpleNamespace(type="mps")])
def test_other_devices_have_no_events(device: Any) -> None:
    assert step_clock._event(device) is None
