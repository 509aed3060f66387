"""The user's loaders made anew in the global order: what is kept, what is left alone and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
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

from launcher.data_order import order_training_data
from launcher.errors import DataError
from strategies.batch import BatchSplit
from tests.unit.training_loaders import keep, ordered, shuffled

# torchdata calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class OwnLoader(DataLoader[Any]):
    pass


def init_worker(number: int) -> None:
    del number


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
                 "generator", "prefetch_factor", "persistent_workers"):  # fmt: skip
        assert getattr(made, name) is getattr(loader, name), name
    assert made.worker_init_fn.keywords["inner"] is loader.worker_init_fn


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
    with pytest.raises(DataError, match=r"has 7 samples, fewer than one global_batch_size 8; give more data"):
        ordered(shuffled(size), accumulate=2)


def test_a_loader_that_ignores_the_planned_batch_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        DataError, match=r"global_batch_size 32 needs 8 samples at once .* 4 ranks, but Owner\..* of 3;"
    ):
        ordered(shuffled(48, 3), micro=8, world_size=4)


def test_without_a_fixed_global_batch_any_loader_will_do() -> None:
    assert len(ordered(shuffled(3, 3), micro=8, world_size=1, fixed=False)) == 1


def test_lightnings_own_objects_take_the_ordered_loaders() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return shuffled()()

    data = Data()
    order_training_data(data, BatchSplit(1, 4, 1), rank=0, seed=5, fixed_global_batch=True, notice=pytest.fail)
    assert type(data.train_dataloader()) is StatefulDataLoader
