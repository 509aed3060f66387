"""One global order of the samples on any number of ranks, resumable in the middle of an epoch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from launcher.training.data.samplers import GlobalOrderSampler, Sharding
from launcher.training.loops.position import Position, scale_position
from tests.support.training_loaders import ordered, shuffled

# torchdata calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


def deal(
    size: int,
    seed: int,
    epoch: int,
    world_size: int,
    global_batch: int | None,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
) -> list[list[int]]:
    """Each rank's samples of one epoch."""
    dealt: list[list[int]] = []
    for rank in range(world_size):
        sampler = GlobalOrderSampler(
            range(size),
            Sharding(world_size, rank, seed, drop_last=drop_last),
            shuffle=shuffle,
            global_batch_size=global_batch,
        )
        sampler.set_epoch(epoch)
        dealt.append(list(sampler))
        assert len(sampler) == len(dealt[-1])
    return dealt


def blocks(dealt: list[list[int]], global_batch: int) -> list[set[int]]:
    micro = global_batch // len(dealt)
    return [{n for mine in dealt for n in mine[at : at + micro]} for at in range(0, len(dealt[0]), micro)]


@given(st.integers(1, 300), st.integers(0, 2**31), st.integers(0, 50), st.sampled_from([4, 6, 12, 24]), st.booleans())
def test_step_k_trains_the_same_samples_on_any_number_of_ranks(
    size: int, seed: int, epoch: int, global_batch: int, shuffle: bool
) -> None:
    alone = deal(size, seed, epoch, 1, global_batch, shuffle=shuffle)
    expected = blocks(alone, global_batch)
    assert len(expected) == size // global_batch
    assert all(len(block) == global_batch for block in expected), "no sample twice in a step"
    assert len(set(alone[0])) == len(alone[0]), "no sample twice in an epoch"
    assert set(alone[0]) <= set(range(size))
    for world_size in (n for n in (2, 3, 4, 6, 8, 12) if global_batch % n == 0):
        assert blocks(deal(size, seed, epoch, world_size, global_batch, shuffle=shuffle), global_batch) == expected


@given(st.integers(30, 100), st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 50))
def test_order_depends_on_epoch_and_seed(size: int, seed: int, epoch: int, more: int) -> None:
    (order,) = deal(size, seed, epoch, 1, 1)
    assert deal(size, seed, epoch, 1, 1) == [order]
    assert deal(size, seed, epoch + more, 1, 1) != [order]
    assert deal(size, seed + 1000 + more, epoch, 1, 1) != [order]


def test_order_without_shuffling_is_the_datasets() -> None:
    assert deal(10, 5, 3, 1, 4, shuffle=False) == [list(range(8))]


@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4]))
def test_no_sample_is_left_out_without_a_fixed_global_batch(size: int, world_size: int) -> None:
    dealt = deal(size, 1, 0, world_size, None)
    assert {n for mine in dealt for n in mine} == set(range(size))
    assert len({len(mine) for mine in dealt}) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 3, 6])
def test_resume_within_an_epoch_continues_with_the_next_batch(workers: int, taken: int) -> None:
    make = shuffled(num_workers=workers)
    loader = ordered(make, at=(2, 0))
    batches = list(loader)

    again = ordered(make, at=(2, taken))

    assert list(again) == batches[taken:]
    assert sorted(n for batch in batches for n in batch) == list(range(24))
    for each in (loader, again):
        each.sampler.set_epoch(3)
    assert list(again) == list(loader) != batches, "the epoch after it is whole again"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4)])
def test_resume_on_another_number_of_ranks_continues_with_the_same_samples(workers: int, old: int, new: int) -> None:
    total, steps = 8, 2
    position = Position(0, steps, total=steps, world_size=old, batch_sizes=(total // old,))
    now = scale_position(position, new, 1, [total // new])

    parts = [
        list(
            ordered(
                shuffled(48, total // new, num_workers=workers),
                micro=total // new,
                world_size=new,
                rank=rank,
                at=(0, now.batches),
            )
        )
        for rank in range(new)
    ]

    (order,) = deal(48, 5, 0, 1, total)
    went_on = [{n for part in parts for n in part[step]} for step in range(len(parts[0]))]
    assert went_on == [set(order[at : at + total]) for at in range(steps * total, 48, total)]


_SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(_SIZES, st.sampled_from(["min_size", "max_size", "max_size_cycle"]), st.integers(0, 3), st.data())
def test_combined_loaders_of_different_lengths_resume_in_every_mode(
    sizes: list[int], mode: Any, epoch: int, data: st.DataObject
) -> None:
    def batches(taken: int) -> list[Any]:
        loaders = {str(n): shuffled(size)() for n, size in enumerate(sizes)}
        made = ordered(lambda: CombinedLoader(loaders, mode), fixed=False, at=(epoch, taken))
        passed = iter(made)
        # Lightning counts; the iterator of `max_size_cycle` alone does not know that it was placed.
        return [batch for batch, _, _ in itertools.islice(passed, len(made) - taken)]

    complete = batches(0)
    taken = data.draw(st.integers(0, len(complete)))
    assert batches(taken) == complete[taken:]


@pytest.mark.parametrize("collection", [list, dict])
def test_each_of_several_loaders_is_ordered_and_resumed(collection: type) -> None:
    def make() -> Any:
        first, second = shuffled(24)(), shuffled(40)()
        return [first, second] if collection is list else {"a": first, "b": second}

    def loaders(made: Any) -> list[Any]:
        assert type(made) is collection
        return [list(loader) for loader in (made.values() if isinstance(made, dict) else made)]

    complete, rest = loaders(ordered(make)), loaders(ordered(make, at=(0, 2)))
    assert rest == [batches[2:] for batches in complete]
    assert [len(batches) for batches in rest] == [4, 8]


def test_loader_iterated_again_within_an_epoch_has_another_order() -> None:
    loader = ordered(shuffled())
    first, second = list(loader), list(loader)
    assert first != second
    assert sorted(n for batch in second for n in batch) == list(range(24))
