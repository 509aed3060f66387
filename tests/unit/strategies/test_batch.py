"""`strategies.batch`: one global batch on any number of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.batch import BatchSplit, BatchSplitError, largest_divisor, nearest_divisors, split_batch

SIZES = st.integers(1, 2000)
WORLDS = st.integers(1, 130)


def split_or_error(
    size: int, world: int, limit: int | None = None, accumulate: int | None = None
) -> BatchSplit | BatchSplitError:
    try:
        return split_batch(size, world, largest_micro_batch=limit, accumulate=accumulate)
    except BatchSplitError as error:
        return error


@pytest.mark.parametrize(
    ("world", "micro", "accumulate"), [(1, 16, 32), (2, 16, 16), (8, 16, 4), (32, 16, 1), (64, 8, 1), (512, 1, 1)]
)
def test_global_batch_stays_512_on_any_number_of_ranks(world: int, micro: int, accumulate: int) -> None:
    split = split_batch(512, world, largest_micro_batch=16)
    assert split == BatchSplit(world, micro, accumulate)
    assert split.global_batch_size == 512


def test_without_a_limit_the_micro_batch_is_the_rank_share() -> None:
    assert split_batch(48, 4) == BatchSplit(4, 12, 1)


def test_limit_is_rounded_down_to_a_divisor() -> None:
    assert split_batch(60, 2, largest_micro_batch=8) == BatchSplit(2, 6, 5)


def test_requested_accumulation_is_kept() -> None:
    assert split_batch(48, 2, accumulate=3) == BatchSplit(2, 8, 3)


def test_global_size_is_unknown_if_only_the_loader_has_it() -> None:
    assert BatchSplit(2, None, 3).global_batch_size is None


def test_uneven_split_error_lists_nearest_sizes_and_rank_counts() -> None:
    with pytest.raises(BatchSplitError) as caught:
        split_batch(100, 64)
    assert caught.value.nearest_global_batch_sizes == (64, 128)
    assert caught.value.nearest_world_sizes == (50, 100)
    assert str(caught.value) == (
        "global_batch_size 100 cannot be shared by 64 ranks; nearest: global_batch_size 64 or 128, or 50 or 100 ranks"
    )


def test_batch_smaller_than_rank_count_suggests_only_a_larger_size() -> None:
    with pytest.raises(BatchSplitError) as caught:
        split_batch(3, 8)
    assert caught.value.nearest_global_batch_sizes == (8,)
    assert caught.value.nearest_world_sizes == (3,)


def test_uneven_split_error_names_the_accumulation() -> None:
    with pytest.raises(BatchSplitError, match="by 2 ranks x 5 accumulated batches") as caught:
        split_batch(48, 2, accumulate=5)
    assert caught.value.nearest_global_batch_sizes == (40, 50)
    # 48 is not a multiple of 5, so no number of ranks works.
    assert caught.value.nearest_world_sizes == ()
    assert str(caught.value).endswith("nearest: global_batch_size 40 or 50")


@pytest.mark.parametrize(("size", "world", "name"), [(0, 1, "global_batch_size"), (-4, 1, "global_batch_size"),
                                                     (4, 0, "world_size"), (4, -1, "world_size")])  # fmt: skip
def test_sizes_below_one_are_rejected_by_name(size: int, world: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        split_batch(size, world)


@pytest.mark.parametrize("accumulate", [0, -1])
def test_accumulation_below_one_is_rejected_by_name(accumulate: int) -> None:
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        split_batch(8, 2, accumulate=accumulate)


@pytest.mark.timeout(5)
def test_large_prime_is_rejected_quickly() -> None:
    with pytest.raises(BatchSplitError) as caught:
        split_batch(2**31 - 1, 2)
    assert caught.value.nearest_world_sizes == (1, 2**31 - 1)


@settings(deadline=None)
@given(SIZES, WORLDS, st.none() | st.integers(1, 300))
def test_split_multiplies_to_the_global_batch_within_the_limit(size: int, world: int, limit: int | None) -> None:
    split = split_or_error(size, world, limit)
    if isinstance(split, BatchSplitError):
        assert size % world
        return
    assert split.global_batch_size == size
    assert split.micro_batch_size is not None
    assert limit is None or split.micro_batch_size <= limit
    # No larger divisor of the rank's share is within the limit.
    share = size // world
    assert not [n for n in range(split.micro_batch_size + 1, (limit or share) + 1) if share % n == 0]


@settings(deadline=None)
@given(SIZES, WORLDS, st.integers(1, 12))
def test_fixed_accumulation_multiplies_to_the_global_batch_or_is_rejected(
    size: int, world: int, accumulate: int
) -> None:
    split = split_or_error(size, world, accumulate=accumulate)
    if isinstance(split, BatchSplitError):
        assert size % (world * accumulate)
    else:
        assert (split.accumulate, split.global_batch_size) == (accumulate, size)


@settings(deadline=None)
@given(SIZES, WORLDS, st.none() | st.integers(1, 12))
def test_suggested_sizes_are_the_nearest_valid_sizes(size: int, world: int, accumulate: int | None) -> None:
    error = split_or_error(size, world, accumulate=accumulate)
    if isinstance(error, BatchSplit):
        return
    for offered in error.nearest_global_batch_sizes:
        assert split_batch(offered, world, accumulate=accumulate).global_batch_size == offered
    between = range(min(*error.nearest_global_batch_sizes, size) + 1, max(error.nearest_global_batch_sizes))
    assert all(isinstance(split_or_error(n, world, accumulate=accumulate), BatchSplitError) for n in between)


@settings(deadline=None)
@given(SIZES, WORLDS, st.none() | st.integers(1, 12))
def test_suggested_rank_counts_can_split_the_batch(size: int, world: int, accumulate: int | None) -> None:
    error = split_or_error(size, world, accumulate=accumulate)
    if isinstance(error, BatchSplitError):
        for offered in error.nearest_world_sizes:
            assert split_batch(size, offered, accumulate=accumulate).global_batch_size == size
        # One rank can always do it, unless the accumulation does not divide the batch.
        assert bool(error.nearest_world_sizes) == (size % (accumulate or 1) == 0)
        assert world not in error.nearest_world_sizes


@settings(deadline=None)
@given(SIZES, st.integers(1, 2500))
def test_nearest_divisors(number: int, near: int) -> None:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    assert largest_divisor(number, near) == max(n for n in divisors if n <= near)
    above = [n for n in divisors if n > near][:1]
    assert nearest_divisors(number, near) == (largest_divisor(number, near), *above)
