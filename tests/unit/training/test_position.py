"""The position in the data: from Lightning's counters, and for another number of ranks or another batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.training.loops.position import Position, describe_change, read_position, rewind_position, scale_position


def _counts(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


@pytest.mark.parametrize(
    ("epochs", "batches", "last", "stage", "expected"),
    [
        # before the first epoch, and at the start of an epoch
        ((0, 0, 0, 0), (0, 0, 0, 0), False, "between", (0, 0, "between")),
        ((3, 2, 2, 2), (8, 8, 8, 8), True, "between", (2, 0, "between")),
        # in an epoch: a step, the end of its last batch, a validation, an error in a step
        ((3, 3, 2, 2), (5, 5, 5, 5), False, "between", (2, 5, "between")),
        ((3, 3, 2, 2), (8, 8, 8, 7), True, "batch_end", (2, 8, "batch_end")),
        ((3, 3, 2, 2), (8, 8, 8, 8), True, "validated", (2, 8, "validated")),
        ((3, 3, 2, 2), (6, 6, 5, 5), False, "between", (2, 5, "between")),
        # from plain Lightning
        ((3, 3, 2, 2), (8, 8, 8, 7), False, None, (2, 8, "batch_end")),
        ((3, 3, 2, 2), (8, 8, 8, 8), False, None, (2, 8, "validated")),
        # at the end of an epoch, and after it
        ((3, 3, 3, 2), (8, 8, 8, 8), True, "between", (2, 8, "epoch_end")),
        ((3, 3, 3, 3), (8, 8, 8, 8), True, "between", (3, 0, "between")),
        # ended by the Trainer before its last batch: continued
        ((3, 3, 3, 2), (5, 5, 5, 5), False, "between", (2, 5, "between")),
        ((3, 3, 3, 3), (5, 5, 5, 5), False, "between", (2, 5, "between")),
    ],
)
def test_position_is_read_from_the_counters(
    epochs: Any, batches: Any, last: bool, stage: Any, expected: tuple[int, int, str]
) -> None:
    found = read_position(_counts(*epochs), _counts(*batches), 21, last=last, stage=stage)
    assert (found.epoch, found.batches, found.stage) == expected
    assert Position.from_dict(found.to_dict()) == found


_POSITIONS = st.builds(
    Position,
    epoch=st.integers(0, 5),
    batches=st.integers(1, 40),
    stage=st.sampled_from(["between", "batch_end", "validated"]),
    total=st.integers(40, 400),
    accumulate=st.sampled_from([1, 2, 3, 4]),
)


@given(_POSITIONS, st.booleans())
def test_position_is_rewound_to_the_last_optimizer_step(position: Position, last: bool) -> None:
    position = dataclasses.replace(position, last=last)
    back = rewind_position(position)
    if last or position.batches % position.accumulate == 0:
        assert back == position
        return
    assert back.batches % back.accumulate == 0
    assert 0 < position.batches - back.batches < position.accumulate
    assert back.total - back.batches == position.total - position.batches
    assert back.validated_batches == position.batches - (position.stage == "batch_end")
    reported = describe_change(position, back) if back.in_epoch else "while gradients were accumulated"
    assert "while gradients were accumulated" in reported


@given(st.integers(1, 20), st.sampled_from([(1, 2), (2, 1), (4, 2), (2, 8), (3, 6)]), st.sampled_from([1, 2, 3]))
def test_number_of_samples_is_kept_on_another_number_of_ranks(
    steps: int, worlds: tuple[int, int], accumulate: int
) -> None:
    """With a global batch of 288 samples, split into micro batches by the accumulation."""
    old, new = worlds
    accumulate_now = accumulate + 1 if 288 % (new * (accumulate + 1)) == 0 else accumulate
    sizes = 288 // (old * accumulate), 288 // (new * accumulate_now)
    position = Position(1, steps * accumulate, "batch_end", False, (steps + 9) * accumulate, accumulate, accumulate,
                        old, (sizes[0],))  # fmt: skip
    now = scale_position(position, new, accumulate_now, [sizes[1]])
    assert now.batches == steps * accumulate_now
    assert now.total == (steps + 9) * accumulate_now
    assert (now.stage, now.accumulate, now.world_size) == ("batch_end", accumulate_now, new)
    assert describe_change(position, now) is None


def test_partial_step_is_repeated_with_a_notice() -> None:
    position = Position(0, 5, "validated", total=5, world_size=1, batch_sizes=(4,))
    now = scale_position(position, 2, 1, [4])
    assert (now.batches, now.stage) == (2, "between")
    reported = describe_change(position, now)
    assert reported.startswith("20 samples of the epoch were trained")
    assert "continues after 16" in reported


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(8,), (8, None), (None,)])
def test_checkpoint_of_plain_lightning_resumes_at_its_batch(world_size: int, sizes: tuple[int | None, ...]) -> None:
    """It does not contain the number of ranks and the batch size."""
    position = Position(0, 4, "validated", total=12)
    now = scale_position(position, world_size, 1, sizes)
    assert (now.batches, now.total, now.stage, now.world_size) == (4, 12, "validated", world_size)
    assert describe_change(position, now) is None


def test_loader_without_a_batch_size_is_compared_by_batches() -> None:
    position = Position(0, 4, total=4, batch_sizes=(None, 8))
    assert describe_change(position, scale_position(position, 1, 1, [4, 8])) is None


def test_another_number_of_loaders_gives_a_notice() -> None:
    position = Position(0, 5, total=5, batch_sizes=(4, 4))
    reported = describe_change(position, scale_position(position, 1, 1, [4]))
    assert "had 2 training loaders and this run has 1" in reported


def test_accumulation_set_by_a_callback_is_kept() -> None:
    position = Position(0, 6, total=6, accumulate=3, planned_accumulate=1, batch_sizes=(4,))
    assert scale_position(position, 1, 1, [4]).accumulate == 3
