"""Loaders of the user in the global order: what is kept, what is not changed and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from launcher.core.errors import DataError
from tests.support.training_loaders import keep, ordered, shuffled

# torchdata calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class OwnLoader(DataLoader[Any]):
    """Cannot be created again from its attributes."""

    def __init__(self, needed: str, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, 4, **options)
        assert needed == "needed"


class Reversed(DataLoader[Any]):
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


def init_worker(number: int) -> None:
    del number


def test_settings_of_the_loader_are_kept() -> None:
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
    made: Any = ordered(lambda: loader)
    assert type(made) is DataLoader
    for name in ("dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout",
                 "generator", "prefetch_factor", "persistent_workers"):  # fmt: skip
        assert getattr(made, name) is getattr(loader, name), name
    assert cast(Any, made.worker_init_fn).keywords["inner"] is loader.worker_init_fn


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffle_setting_is_kept(shuffle: bool) -> None:
    made = ordered(lambda: DataLoader(range(24), 4, shuffle=shuffle, collate_fn=keep))  # type: ignore[arg-type]
    samples = [n for batch in made for n in batch]
    assert sorted(samples) == list(range(24))
    assert (samples != list(range(24))) is shuffle


_NUMBERS: Any = range(24)


class OwnBatches(BatchSampler):
    """Batches of neighbouring samples, in random order."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        random.shuffle(batches)
        return iter(batches)


class OwnSampler(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(24).tolist())

    def __len__(self) -> int:
        return 24


_KEPT: dict[str, Callable[..., DataLoader[Any]]] = {
    "weighted": lambda **o: DataLoader(_NUMBERS, 4, sampler=WeightedRandomSampler([1.0] * 24, 24), **o),
    "with a generator": lambda **o: DataLoader(
        _NUMBERS, 4, sampler=WeightedRandomSampler([1.0] * 24, 24, generator=torch.Generator()), **o
    ),
    "subset": lambda **o: DataLoader(_NUMBERS, 4, sampler=SubsetRandomSampler([1, 2, 5, 7, 8, 9]), **o),
    "with replacement": lambda **o: DataLoader(_NUMBERS, 4, sampler=RandomSampler(_NUMBERS, replacement=True), **o),
    "a part": lambda **o: DataLoader(_NUMBERS, 4, sampler=RandomSampler(_NUMBERS, num_samples=8), **o),
    "own sampler": lambda **o: DataLoader(_NUMBERS, 4, sampler=OwnSampler(), **o),
    "own batches": lambda **o: DataLoader(
        _NUMBERS, batch_sampler=OwnBatches(RandomSampler(_NUMBERS, generator=torch.Generator()), 4, True), **o
    ),
    "own loader": lambda **o: OwnLoader("needed", _NUMBERS, shuffle=True, **o),
    "stateful": lambda **o: StatefulDataLoader(_NUMBERS, 4, shuffle=True, **o),
    "one by one": lambda **o: DataLoader(_NUMBERS, None, shuffle=True, **o),
    "distributed": lambda **o: DataLoader(
        _NUMBERS, 4, sampler=DistributedSampler(_NUMBERS, num_replicas=2, rank=1), **o
    ),
}


@pytest.mark.parametrize("kind", _KEPT)
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_its_class_and_resumes(kind: str, workers: int) -> None:
    def placed(epoch: int, taken: int, workers: int = workers) -> tuple[Any, list[Any]]:
        loader = ordered(lambda: _KEPT[kind](num_workers=workers, collate_fn=keep), fixed=False, at=(epoch, taken))
        torch.manual_seed(epoch + taken)  # the training's generators have another state
        return loader, list(loader)

    loader, complete = placed(3, 0)
    assert type(loader) is type(_KEPT[kind]())
    assert placed(3, 1)[1] == complete[1:]
    assert placed(3, len(complete))[1] == []
    # With workers as without them, where starting none takes less time.
    assert complete == placed(3, 0, workers=0)[1]
    assert complete != placed(2, 0, workers=0)[1]


@pytest.mark.parametrize("kind", ["weighted", "own sampler", "own batches", "own loader"])
def test_ranks_share_the_samples_of_a_user_sampler(kind: str) -> None:
    def drawn(world_size: int, rank: int) -> list[Any]:
        return list(ordered(lambda: _KEPT[kind](collate_fn=keep), fixed=False, world_size=world_size, rank=rank))

    alone, parts = drawn(1, 0), [drawn(2, rank) for rank in (0, 1)]
    dealt = sorted(n for part in parts for batch in part for n in batch)
    if kind == "own batches":  # each rank batches its own samples
        assert dealt == list(range(24))
    else:
        assert dealt == sorted(n for batch in alone for n in batch)


@pytest.mark.parametrize(
    ("make", "reported"),
    [
        (lambda: DataLoader(Stream(), 4), "(its dataset is iterable): a resume restarts its epoch"),
        (
            lambda: StatefulDataLoader(Stream(), 4),
            "(its dataset is iterable): a resume gives all ranks the loader state",
        ),
        (lambda: [1], "(list is not a DataLoader): a resume restarts its epoch"),
        (lambda: CombinedLoader([CombinedLoader(DataLoader(_NUMBERS))]), "(CombinedLoader): a resume restarts"),
        (_KEPT["own sampler"], "OwnSampler decides the order of the training data: a resume repeats it if it depends"),
        (_KEPT["own batches"], "OwnBatches decides the order of the training data: a resume repeats it if it depends"),
        (lambda: Reversed(_NUMBERS, 4), "Reversed overrides __iter__"),
    ],
)
def test_inexact_resume_gives_one_notice(make: Callable[[], Any], reported: str) -> None:
    notices: list[str] = []
    ordered(lambda: CombinedLoader([make(), make()]), fixed=False, notices=notices)
    (notice,) = notices
    assert reported in notice


def test_each_rank_reads_all_samples_without_the_distributed_sampler() -> None:
    for rank in (0, 1):
        loader = ordered(shuffled(), fixed=False, world_size=2, rank=rank, distribute=False)
        assert sorted(n for batch in loader for n in batch) == list(range(24))


@pytest.mark.parametrize("world_size", [1, 2])
def test_overfit_batches_are_the_same_in_every_epoch(world_size: int) -> None:
    loader: Any = ordered(shuffled(num_workers=1), world_size=world_size, overfit=True)
    assert isinstance(loader.sampler, SequentialSampler), "Lightning leaves it as it is"
    batches = list(loader)
    assert [n for batch in batches for n in batch] == list(range(0, 24, world_size))
    cast(Any, loader.sampler).set_epoch(1)
    assert list(loader) == batches


class Leveled(Sampler[Any]):
    """A curriculum: samples below a level that the training raises; also as batches."""

    def __init__(self, batches: bool) -> None:
        self.level, self._batches = 8, batches

    def __iter__(self) -> Iterator[Any]:
        for n in reversed(range(24)):
            yield [n % self.level] * 4 if self._batches else n % self.level

    def __len__(self) -> int:
        return 24


class LeveledBatches(BatchSampler):
    """The same with torch's own sampler."""

    level = 8

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield [n % self.level for n in batch]


def _leveled(kind: str) -> tuple[Any, DataLoader[Any]]:
    if kind == "sampler":
        own: Any = Leveled(batches=False)
        return own, DataLoader(_NUMBERS, 4, sampler=own, collate_fn=keep)
    own = Leveled(batches=True) if kind == "batches" else LeveledBatches(RandomSampler(_NUMBERS), 4, drop_last=False)
    return own, DataLoader(_NUMBERS, batch_sampler=own, collate_fn=keep)


@pytest.mark.parametrize("reach", ["own object", "the loader's sampler", "the loader's batch sampler"])
@pytest.mark.parametrize("kind", ["sampler", "batches", "batches over torch's"])
def test_changes_of_a_user_sampler_take_effect(kind: str, reach: str) -> None:
    own, loader = _leveled(kind)
    made = ordered(lambda: loader, fixed=False)
    if reach == "the loader's sampler":
        changed = made.sampler
    elif reach == "own object" or kind != "sampler":
        changed = own if reach == "own object" else made.batch_sampler
    else:
        changed = made.batch_sampler.sampler
    assert max(n for batch in made for n in batch) == 7
    changed.level = 24
    assert (own.level, changed.level) == (24, 24)
    drawn = iter(made)
    first = [n for _ in range(4) for n in next(drawn)]
    # Within an epoch: the remaining items follow.
    changed.level = 2
    rest = [n for batch in drawn for n in batch]
    assert max(first) > 7
    assert max(rest[4:]) == 1
    assert kind != "batches over torch's" or type(own.sampler) is RandomSampler, "the user's object is as it was"


class Fixed(LeveledBatches):
    """Shows its sampler as a read-only property."""

    def __init__(self) -> None:
        self._drawn_from = RandomSampler(_NUMBERS)
        self.batch_size, self.drop_last = 4, False

    @property
    def sampler(self) -> Any:  # type: ignore[override]
        return self._drawn_from


@pytest.mark.parametrize("world_size", [1, 2])
def test_batch_sampler_with_a_read_only_sampler_is_not_changed(world_size: int) -> None:
    notices: list[str] = []
    made = ordered(lambda: DataLoader(_NUMBERS, batch_sampler=Fixed(), collate_fn=keep), fixed=False,
                   world_size=world_size, notices=notices)  # fmt: skip
    assert len(list(made)) == 6
    assert any("is not changed" in notice for notice in notices) is (world_size == 2)


def test_batch_sampler_over_torchs_sampler_is_distributed() -> None:
    shares = [ordered(lambda: _leveled("batches over torch's")[1], fixed=False, world_size=2, rank=n) for n in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    for share in shares:
        share.batch_sampler.level = 24
    drawn = [n for share in shares for batch in share for n in batch]
    assert sorted(drawn) == list(range(24))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_error_of_empty_data_names_the_class(shuffle: bool, fixed: bool) -> None:
    with pytest.raises(
        DataError, match=r"^the training data is empty: Owner\.train_dataloader returned a loader without"
    ):
        ordered(lambda: DataLoader([], 4, shuffle=shuffle), fixed=fixed)  # type: ignore[arg-type]


def test_error_of_user_code_is_not_changed() -> None:
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
        DataError, match=r"global_batch_size 32 needs batch_size 8 on each of 4 ranks, but Owner\..* with 3;"
    ):
        ordered(shuffled(48, 3), micro=8, world_size=4)


def test_each_combined_loader_must_have_the_planned_batch() -> None:
    def make() -> Any:
        return CombinedLoader({"a": shuffled(24, 4)(), "b": shuffled(24, 3)()}, "min_size")

    with pytest.raises(DataError, match=r"needs batch_size 4 .* returned a loader with 3"):
        ordered(make)


def test_unplanned_batch_without_a_fixed_global_batch_is_reported() -> None:
    notices: list[str] = []
    batches: list[tuple[str, int]] = []
    known: dict[str, Any] = {"world_size": 2, "fixed": False, "notices": notices, "batches": batches}
    assert len(ordered(shuffled(3, 3), micro=8, **known)) == 1
    assert batches == [("Owner.train_dataloader", 3)], "the plan is corrected"
    ordered(shuffled(3, 3), micro=3, **known)
    assert len(batches) == 1
    assert notices == []
    ordered(lambda: [shuffled(3, 3)(), shuffled(3, 2)()], micro=3, **known)
    assert notices == ["Owner.train_dataloader returned a loader with batch_size 2; the plan has 3 for each rank"]
