"""`strategies.batch`: fields of the error for an uneven split, and edge cases."""

from __future__ import annotations

import pytest

from strategies.batch import BatchSplitError, largest_divisor, split_batch


def test_error_fields_hold_the_request_and_nearest_values() -> None:
    with pytest.raises(BatchSplitError) as caught:
        split_batch(50, 4)
    error = caught.value
    assert (error.global_batch_size, error.world_size) == (50, 4)
    assert (error.nearest_global_batch_sizes, error.nearest_world_sizes) == ((48, 52), (2, 5))
    assert str(error) == (
        "global_batch_size 50 cannot be shared by 4 ranks; nearest: global_batch_size 48 or 52, or 2 or 5 ranks"
    )


def test_no_rank_count_is_suggested_if_accumulation_does_not_divide() -> None:
    with pytest.raises(BatchSplitError) as caught:
        split_batch(50, 2, accumulate=4)
    assert (caught.value.nearest_global_batch_sizes, caught.value.nearest_world_sizes) == ((48, 56), ())
    assert str(caught.value) == (
        "global_batch_size 50 cannot be shared by 2 ranks x 4 accumulated batches; nearest: global_batch_size 48 or 56"
    )


def test_size_below_rank_count_has_one_suggestion() -> None:
    with pytest.raises(BatchSplitError) as caught:
        split_batch(3, 4)
    assert caught.value.nearest_global_batch_sizes == (4,)


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("global_batch_size", (0, 1), {}),
        ("world_size", (4, 0), {}),
        ("largest_micro_batch", (4, 1), {"largest_micro_batch": 0}),
        ("accumulate", (4, 1), {"accumulate": -1}),
    ],
)
def test_size_below_1_is_rejected_by_name(name: str, sizes: tuple[int, int], options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, -?\d was given$"):
        split_batch(*sizes, **options)


def test_split_values_are_integers() -> None:
    for split in (split_batch(24, 2, accumulate=3), split_batch(24, 2, largest_micro_batch=5)):
        assert (type(split.micro_batch_size), type(split.accumulate)) == (int, int)


def test_largest_divisor_is_at_least_1() -> None:
    assert (largest_divisor(12, 0), largest_divisor(12, 1), largest_divisor(12, 100)) == (1, 1, 12)
