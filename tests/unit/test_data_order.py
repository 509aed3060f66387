"""One global order of the samples on any number of ranks, resumable in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from launcher.data_order import GlobalOrderSampler, order_training_data
from launcher.errors import DataError
from strategies.batch import BatchSplit

# torchdata calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Owner:
    """Has a `train_dataloader`, as a LightningModule or LightningDataModule has."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class OwnLoader(DataLoader[Any]):
    pass


def keep(samples: list[int]) -> list[int]:
    return samples


def init_worker(number: int) -> None:
    del number


def ordered(
    make: Callable[[], Any],
    *,
    micro: int | None = 4,
    world_size: int = 1,
    rank: int = 0,
    accumulate: int = 1,
    fixed: bool = True,
    resume: Sequence[Mapping[str, Any]] = (),
    notices: list[str] | None = None,
) -> Any:
    """What `make`'s loaders become."""
    owner: Any = Owner(make)
    order_training_data(
        owner,
        BatchSplit(world_size, micro, accumulate),
        rank=rank,
        seed=5,
        fixed_global_batch=fixed,
        resume_states=resume,
        notice=([] if notices is None else notices).append,
    )
    return owner.train_dataloader()


def shuffled(size: int = 24, batch_size: int = 4, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(range(size), batch_size, shuffle=True, collate_fn=keep, **options)  # type: ignore[arg-type]


def deal(
    size: int, seed: int, epoch: int, world_size: int, global_batch: int | None, **options: Any
) -> list[list[int]]:
    """Each rank's samples of one epoch."""
    dealt: list[list[int]] = []
    for rank in range(world_size):
        sampler = GlobalOrderSampler(
            range(size),
            world_size=world_size,
            rank=rank,
            seed=seed,
            global_batch_size=global_batch,
            **{"shuffle": True, "drop_last": False, **options},
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
def test_each_epoch_has_an_order_of_its_own_and_each_seed_too(size: int, seed: int, epoch: int, more: int) -> None:
    (order,) = deal(size, seed, epoch, 1, 1)
    assert deal(size, seed, epoch, 1, 1) == [order]
    assert deal(size, seed, epoch + more, 1, 1) != [order]
    assert deal(size, seed + 1000 + more, epoch, 1, 1) != [order]


def test_without_shuffling_the_order_is_the_datasets_own() -> None:
    assert deal(10, 5, 3, 1, 4, shuffle=False) == [list(range(8))]


@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4]))
def test_without_a_fixed_global_batch_no_sample_is_left_out(size: int, world_size: int) -> None:
    dealt = deal(size, 1, 0, world_size, None)
    assert {n for mine in dealt for n in mine} == set(range(size))
    assert len({len(mine) for mine in dealt}) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 3])
def test_a_resume_in_the_middle_of_an_epoch_goes_on_with_the_next_batch(workers: int, taken: int) -> None:
    make = shuffled(num_workers=workers)
    loader = ordered(make)
    iterator = iter(loader)
    before = [next(iterator) for _ in range(taken)]
    state = loader.state_dict()
    rest = list(iterator)
    second_epoch = [] if workers else _next_epoch(loader)

    again = ordered(make, resume=[state])

    assert list(again) == rest
    assert sorted(n for batch in before + rest for n in batch) == list(range(24))
    if not workers:
        assert _next_epoch(again) == second_epoch, "the epoch after it is whole again"


def _next_epoch(loader: StatefulDataLoader[Any]) -> list[Any]:
    sampler: Any = loader.sampler
    sampler.set_epoch(1)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4)])
def test_a_resume_on_another_number_of_ranks_goes_on_with_the_same_samples(workers: int, old: int, new: int) -> None:
    total, taken = 8, 2
    make = {n: shuffled(48, total // n, num_workers=workers) for n in (old, new)}
    loader = ordered(make[old], micro=total // old, world_size=old)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    state = loader.state_dict()
    del iterator

    parts = [
        list(ordered(make[new], micro=total // new, world_size=new, rank=rank, resume=[state])) for rank in range(new)
    ]

    (order,) = deal(48, 5, 0, 1, total)
    went_on = [{n for part in parts for n in part[step]} for step in range(len(parts[0]))]
    assert went_on == [set(order[at : at + total]) for at in range(taken * total, 48, total)]


def test_the_loaders_settings_are_kept() -> None:
    generator = torch.Generator()
    loader = DataLoader(
        range(24),  # type: ignore[arg-type]
        4,
        shuffle=True,
        num_workers=2,
        collate_fn=keep,
        pin_memory=True,
        drop_last=True,
        timeout=9,
        worker_init_fn=init_worker,
        generator=generator,
        prefetch_factor=3,
        persistent_workers=True,
    )
    made = ordered(lambda: loader)
    assert type(made) is StatefulDataLoader
    for name in ("dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout",
                 "worker_init_fn", "generator", "prefetch_factor", "persistent_workers"):  # fmt: skip
        assert getattr(made, name) is getattr(loader, name), name


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_users_wish_to_shuffle_is_kept(shuffle: bool) -> None:
    made = ordered(lambda: DataLoader(range(24), 4, shuffle=shuffle, collate_fn=keep))  # type: ignore[arg-type]
    samples = [n for batch in made for n in batch]
    assert sorted(samples) == list(range(24))
    assert (samples != list(range(24))) is shuffle


_NUMBERS: Any = range(24)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DataLoader(Stream(), 4), "iterable"),
        (
            lambda: DataLoader(_NUMBERS, batch_sampler=BatchSampler(SequentialSampler(_NUMBERS), 4, True)),
            "batch sampler",
        ),
        (lambda: DataLoader(_NUMBERS, 4, sampler=WeightedRandomSampler([1.0] * 24, 24)), "WeightedRandomSampler"),
        (lambda: DataLoader(_NUMBERS, 4, sampler=SubsetRandomSampler([1, 2])), "SubsetRandomSampler"),
        (lambda: DataLoader(_NUMBERS, 4, sampler=RandomSampler(_NUMBERS, replacement=True)), "with replacement"),
        (lambda: DataLoader(_NUMBERS, 4, sampler=RandomSampler(_NUMBERS, num_samples=8)), "a part of the data"),
        (lambda: OwnLoader(_NUMBERS, 4), "OwnLoader of its own"),
        (lambda: DataLoader(_NUMBERS, None), "batch sampler"),
    ],
)
def test_a_loader_that_cannot_be_made_anew_is_left_alone_with_one_notice(
    make: Callable[[], DataLoader[Any]], reason: str
) -> None:
    loader = make()
    notices: list[str] = []
    assert ordered(lambda: loader, fixed=False, notices=notices) is loader
    (notice,) = notices
    assert reason in notice
    assert "a resume begins its epoch anew" in notice


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_empty_data_is_told_by_the_class_that_made_it(shuffle: bool, fixed: bool) -> None:
    with pytest.raises(DataError, match=r"^the training data is empty: Owner\.train_dataloader made a loader of no"):
        ordered(lambda: DataLoader([], 4, shuffle=shuffle), fixed=fixed)  # type: ignore[arg-type]


def test_an_error_of_the_users_own_comes_out_as_it_is() -> None:
    def make() -> Any:
        raise ValueError("num_workers must be right")

    with pytest.raises(ValueError, match="num_workers must be right"):
        ordered(make)


@pytest.mark.parametrize(("size", "enough"), [(7, False), (8, True)])
def test_less_data_than_one_global_batch_is_refused(size: int, enough: bool) -> None:
    if enough:
        assert len(ordered(shuffled(size), accumulate=2)) == 2
        return
    with pytest.raises(DataError, match=r"has 7 samples, fewer than one global_batch_size 8$"):
        ordered(shuffled(size), accumulate=2)


def test_a_loader_that_ignores_the_planned_batch_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        DataError, match=r"global_batch_size 32 needs 8 samples at once .* 4 ranks, but Owner\..* of 3;"
    ):
        ordered(shuffled(48, 3), micro=8, world_size=4)


def test_without_a_fixed_global_batch_any_loader_will_do() -> None:
    assert len(ordered(shuffled(3, 3), micro=8, world_size=1, fixed=False)) == 1


@pytest.mark.parametrize("collection", [list, dict])
def test_each_of_several_loaders_is_ordered_and_resumed_in_its_place(collection: type) -> None:
    def make() -> Any:
        first, second = shuffled(24)(), shuffled(40)()
        return [first, second] if collection is list else {"a": first, "b": second}

    def loaders(made: Any) -> list[StatefulDataLoader[Any]]:
        assert type(made) is collection
        return list(made.values()) if isinstance(made, dict) else made

    states, rests = [], []
    for taken, loader in zip((1, 2), loaders(ordered(make)), strict=True):
        iterator = iter(loader)
        for _ in range(taken):
            next(iterator)
        states.append(loader.state_dict())
        rests.append(list(iterator))
    assert [list(loader) for loader in loaders(ordered(make, resume=states))] == rests
    assert [len(rest) for rest in rests] == [5, 8]


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 20))
def test_the_state_counts_the_samples_of_all_ranks(world_size: int, taken: int) -> None:
    def sampler() -> GlobalOrderSampler:
        return GlobalOrderSampler(
            range(100), world_size=world_size, rank=0, shuffle=True, seed=1, global_batch_size=4, drop_last=False
        )

    one, two = sampler(), sampler()
    iterator = iter(one)
    for _ in range(taken):
        next(iterator)
    assert one.state_dict()["samples"] == taken * world_size
    two.load_state_dict(one.state_dict())
    assert list(two) == list(iterator)


def test_lightnings_own_objects_take_the_ordered_loaders() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return shuffled()()

    data = Data()
    order_training_data(data, BatchSplit(1, 4, 1), rank=0, seed=5, fixed_global_batch=True, notice=pytest.fail)
    assert type(data.train_dataloader()) is StatefulDataLoader
