"""`strategies.loss_scale`: counts on the device, saved and restored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.loss_scale import CountingGradScaler, find_loss_scale, state_problem
from tests.support.plain_trainer import plain_trainer

STATE = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}
BIG, SMALL = 1e36, 1.0


def step(scaler: torch.amp.GradScaler, *factors: float) -> list[bool]:
    """Run one step for each factor of the loss; return whether each step was applied."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in factors]
    optimizers = [torch.optim.SGD([weight], lr=0.5) for weight in weights]
    loss = torch.stack([(weight * factor).sum() for weight, factor in zip(weights, factors, strict=True)])
    torch.autograd.backward([scaler.scale(part) for part in loss])
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return [bool((weight != 1).any()) for weight in weights]


def counting(**options: Any) -> CountingGradScaler:
    return CountingGradScaler("cpu", **{"init_scale": 1024.0, **options})


def counts(skipped: int = 0, overflows: int = 0, floor: int = 0) -> dict[str, int]:
    return {"skipped_steps": skipped, "overflows": overflows, "floor_steps": floor}


def test_overflow_skips_a_step_and_is_counted_once() -> None:
    scaler = counting()
    assert step(scaler, SMALL) == [True]
    assert scaler.counts() == counts()
    assert step(scaler, BIG) == [False]
    assert scaler.counts() == counts(skipped=1, overflows=1)
    assert step(scaler, SMALL) == [True]
    assert scaler.counts() == counts(skipped=1, overflows=1)
    assert scaler.get_scale() == 512.0


def test_two_overflows_in_one_step_count_as_one_skipped_step() -> None:
    scaler = counting()
    assert step(scaler, BIG, BIG) == [False, False]
    assert scaler.counts() == counts(skipped=1, overflows=2)
    assert step(scaler, BIG, SMALL) == [False, True]
    assert scaler.counts() == counts(skipped=2, overflows=3)


def test_consecutive_floor_steps_are_counted_and_reset_above_the_floor() -> None:
    scaler = counting(init_scale=4.0, growth_interval=2, floor=1.0)
    seen = []
    for factor in (math.inf, math.inf, math.inf, SMALL, SMALL, math.inf):
        step(scaler, factor)
        seen.append((scaler.get_scale(), scaler.counts()["floor_steps"]))
    assert seen == [(2.0, 0), (1.0, 1), (0.5, 2), (0.5, 3), (1.0, 4), (0.5, 5)]
    step(scaler, SMALL)
    step(scaler, SMALL)
    step(scaler, SMALL)
    step(scaler, SMALL)
    assert (scaler.get_scale(), scaler.counts()["floor_steps"]) == (2.0, 0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([SMALL, BIG]), min_size=1, max_size=12), st.integers(1, 4))
def test_scale_changes_as_in_torch(factors: list[float], interval: int) -> None:
    own, torchs = counting(growth_interval=interval), torch.amp.GradScaler("cpu", 1024.0, growth_interval=interval)
    taken = [(step(own, factor), step(torchs, factor), own.get_scale() == torchs.get_scale()) for factor in factors]
    assert all(mine == theirs and same for mine, theirs, same in taken)
    assert {**own.state_dict(), "counts": None} == {**torchs.state_dict(), "counts": None}
    assert own.counts()["skipped_steps"] == sum(theirs == [False] for _, theirs, _ in taken)


def test_setting_the_scale_is_not_counted_as_a_step() -> None:
    scaler = counting()
    step(scaler, BIG)
    scaler.update(64.0)
    assert (scaler.get_scale(), scaler.counts()) == (64.0, counts(skipped=1, overflows=1))


def test_misuse_raises_the_error_of_torch() -> None:
    with pytest.raises(AssertionError, match="scale"):
        counting().update()
    scaler = counting()
    scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.update()


def test_counts_continue_from_a_saved_state() -> None:
    saved = counting()
    step(saved, BIG)
    state = saved.state_dict()
    assert state["counts"] == counts(skipped=1, overflows=1)

    fresh, used = counting(), counting()
    step(used, BIG)
    step(used, BIG)
    for scaler in (fresh, used):
        scaler.load_state_dict(state)
        assert (scaler.get_scale(), scaler.counts()) == (512.0, counts(skipped=1, overflows=1))
        step(scaler, BIG)
        assert (scaler.get_scale(), scaler.counts()) == (256.0, counts(skipped=2, overflows=2))


def test_state_is_compatible_with_a_plain_scaler() -> None:
    own = counting()
    step(own, BIG)
    plain = torch.amp.GradScaler("cpu")
    plain.load_state_dict(own.state_dict())
    assert plain.get_scale() == 512.0
    back = counting()
    back.load_state_dict(plain.state_dict())
    assert (back.get_scale(), back.counts()) == (512.0, counts())


def test_adopted_scaler_continues_from_the_plain_scaler() -> None:
    plain = torch.amp.GradScaler("cpu", 256.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=7)
    step(plain, SMALL)
    adopted = CountingGradScaler.adopt(plain, floor=16.0)
    assert {**adopted.state_dict(), "counts": None} == {**plain.state_dict(), "counts": None}
    assert (adopted._device, adopted.floor) == ("cpu", 16.0)
    step(adopted, math.inf)
    assert (adopted.get_scale(), adopted.counts()["skipped_steps"]) == (64.0, 1)


DAMAGED: list[tuple[Any, str]] = [
    ("text", "it is a str, not a mapping"),
    (None, "it is a NoneType, not a mapping"),
    ({}, "it is empty"),
    ({"scale": 2.0, "growth_factor": 2.0}, "it lacks backoff_factor, growth_interval, _growth_tracker"),
    ({**STATE, "scale": "8"}, "scale is '8'"),
    ({**STATE, "scale": True}, "scale is True"),
    ({**STATE, "scale": math.nan}, "scale is nan"),
    ({**STATE, "scale": math.inf}, "scale is inf"),
    ({**STATE, "scale": -1.0}, "scale is -1.0"),
    ({**STATE, "growth_interval": None}, "growth_interval is None"),
    ({**STATE, "_growth_tracker": [1]}, "_growth_tracker is [1]"),
    ({**STATE, "scale": 0.0}, "scale, growth_factor or backoff_factor is out of range"),
    ({**STATE, "growth_factor": 1.0}, "scale, growth_factor or backoff_factor is out of range"),
    ({**STATE, "backoff_factor": 0.0}, "scale, growth_factor or backoff_factor is out of range"),
    ({**STATE, "backoff_factor": 1.0}, "scale, growth_factor or backoff_factor is out of range"),
]


@pytest.mark.case(21)
@pytest.mark.parametrize(("state", "problem"), DAMAGED)
def test_damaged_state_logs_a_warning_and_resets_the_scale(
    state: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert state_problem(state) == problem
    scaler = counting()
    scaler.load_state_dict(state)
    assert caplog.messages == [f"the saved loss scale is not used: {problem}; it starts again at 1024"]
    assert scaler.get_scale() == 1024.0
    assert step(scaler, SMALL) == [True]


LARGEST, LARGEST_COUNT = torch.finfo(torch.float32).max, 2**31 - 1


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [("scale", LARGEST, True), ("scale", LARGEST * 1.001, False), ("scale", 10**400, False), ("scale", 8, True),
     ("growth_interval", LARGEST_COUNT, True), ("growth_interval", LARGEST_COUNT + 1, False),
     ("growth_interval", 10.0, False), ("_growth_tracker", LARGEST_COUNT, True), ("_growth_tracker", 2**40, False)],
)  # fmt: skip
def test_number_out_of_device_range_is_a_damaged_state(key: str, value: float, fits: bool) -> None:
    problem = state_problem({**STATE, key: value})
    assert (problem is None) is fits
    assert fits or str(problem).startswith(f"{key} is ")


def test_valid_state_has_no_problem() -> None:
    assert state_problem(STATE) is None
    assert state_problem({**STATE, "counts": counts(), "growth_interval": 0, "_growth_tracker": 0}) is None


@pytest.mark.parametrize(
    "saved", ["text", None, [], {"skipped_steps": "many"}, {"skipped_steps": None}, {"skipped_steps": math.nan},
              {"skipped_steps": -4}, {"skipped_steps": LARGEST_COUNT + 1}, {"other": 3}]
)  # fmt: skip
def test_invalid_counts_start_at_zero_and_the_scale_is_restored(saved: Any) -> None:
    scaler = counting()
    scaler.load_state_dict({**STATE, "counts": saved})
    assert (scaler.get_scale(), scaler.counts()) == (8.0, counts())


def test_largest_count_is_restored() -> None:
    scaler = counting()
    scaler.load_state_dict({**STATE, "counts": counts(skipped=LARGEST_COUNT)})
    assert scaler.counts() == counts(skipped=LARGEST_COUNT)


def test_disabled_scaler_scales_nothing_and_loads_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scaler = counting(enabled=False)
    assert step(scaler, SMALL) == [True]
    state = scaler.state_dict()
    assert state == {}
    scaler.load_state_dict(state)
    assert caplog.messages == []
    assert find_loss_scale(plain_trainer(scaler)) is None
