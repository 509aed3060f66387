"""`launcher.monitoring.step_timer`: the time of a step, and the rank's own part of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.monitoring import step_timer as step_clock
from launcher.monitoring.step_timer import StepClock, StepTimes


class Hand:
    """A clock that the test sets, in whole seconds."""

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
    """One batch: waiting for data, then the forward and the backward pass."""

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
    batch(5, 2, 8)
    # The wait before the very first batch is the start of the training.
    assert clock.read(3) == StepTimes(step=39 / 3, data=9 / 3, own=15 / 3)


def test_a_reading_resets_the_means_but_not_the_wait_for_data(clock: StepClock, batch: Callable[..., None]) -> None:
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


def test_a_pause_is_not_counted(hand: Hand, clock: StepClock, batch: Callable[..., None]) -> None:
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


def test_an_end_or_a_backward_pass_without_a_start_is_not_counted(hand: Hand, clock: StepClock) -> None:
    hand.time = 5
    clock.backward_begins()
    clock.batch_ends()
    assert clock.read(1) == StepTimes(0, 0, 0)


def test_an_unused_clock_reads_zero() -> None:
    assert StepClock().read(5) == StepTimes()


class Event:
    """A fake of a CUDA event: has the time of its recording, and has completed by default."""

    def __init__(self, hand: Hand, stream: object) -> None:
        self.hand, self.stream = hand, stream
        self.at: float | None = None
        self.over = True

    def record(self, stream: object) -> None:
        assert stream == self.stream
        self.at = self.hand.time

    def query(self) -> bool:
        return self.over

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None
        assert end.at is not None
        return (end.at - self.at) * 1e3


@pytest.fixture
def events(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The events recorded on the CUDA stream."""
    made: list[Event] = []

    def event(*, enable_timing: bool) -> Event:
        assert enable_timing is True
        made.append(Event(hand, "its stream"))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: {CUDA: "its stream"}[device])
    return made


CUDA = torch.device("cuda", 1)


def test_on_a_cuda_device_the_forward_pass_is_read_one_interval_later(
    clock: StepClock, batch: Callable[..., None], events: list[Event]
) -> None:
    batch(0, 3, 1, CUDA)
    batch(1, 3, 1, CUDA)
    assert clock.read(2) == StepTimes(step=9 / 2, data=1 / 2, own=1 / 2)
    batch(1, 5, 1, CUDA)
    assert clock.read(1) == StepTimes(step=7, data=1, own=1 + 6)
    # Events that have not completed are left out without waiting.
    events[-1].over = False
    assert clock.read(1) == StepTimes(0, 0, 0)
    assert clock.read(1) == StepTimes(0, 0, 0)


def test_on_a_cuda_device_several_backward_passes_are_timed_to_the_first(
    hand: Hand, clock: StepClock, events: list[Event]
) -> None:
    clock.batch_begins(CUDA)
    hand.time += 2
    clock.backward_begins()
    assert len(events) == 2
    hand.time += 2
    clock.backward_begins()
    assert len(events) == 2
    clock.batch_ends()
    clock.read(1)
    # The host's times after the first are not used in the next interval.
    assert clock.read(1).own == 2


@pytest.mark.parametrize("device", [None, "cuda", SimpleNamespace(type="cpu"), SimpleNamespace(type="mps")])
def test_other_devices_have_no_events(device: Any) -> None:
    assert step_clock._event(device) is None
