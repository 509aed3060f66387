"""Random draws of loader workers depend on seed, epoch and sample only."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, random_split

from launcher.checkpoint.rng_state import capture, restore
from launcher.training.data.sample_seeds import SeededIndex, mix_seeds, seed_each_sample
from tests.support.training_loaders import keep, ordered

# torchdata calls what torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
_WORD = st.integers(0, 2**64 - 1)


class Drawing(Dataset[tuple[int, float, float, float]]):
    """A sample is its index and a random number."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        assert type(index) is int, "the user's dataset gets a plain index"
        return index, float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: S311 -- no secret


class DrawingAtOnce(Drawing):
    """Reads a batch at once."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


def _loader(workers: int, dataset: Callable[[], Any] = Drawing, **options: Any) -> Callable[[], DataLoader[Any]]:
    return lambda: DataLoader(dataset(), 4, shuffle=True, collate_fn=keep, num_workers=workers, **options)


@pytest.mark.parametrize("dataset", [Drawing, DrawingAtOnce])
def test_resumed_epoch_repeats_the_draws_of_workers(dataset: type[Drawing]) -> None:
    make = _loader(2, dataset)
    batches = list(ordered(make))
    assert list(ordered(make, at=(0, 3))) == batches[3:]
    draws = [sample[1:] for batch in batches for sample in batch]
    assert len(set(draws)) == 24, "each sample has its own"


def _subset(dataset: Any) -> Any:
    return Subset(dataset, list(range(24))[::-1])


_WRAPPERS: dict[str, Callable[[], Any]] = {
    "plain": Drawing,
    "subset": lambda: _subset(Drawing()),
    "subset of a subset": lambda: _subset(_subset(Drawing())),
    "random_split": lambda: random_split(Drawing(), [24], torch.Generator().manual_seed(1))[0],
    "concatenated": lambda: ConcatDataset([Subset(Drawing(), range(10)), Subset(Drawing(), range(10, 24))]),
    "subset of concatenated": lambda: _subset(ConcatDataset([Drawing()])),
}


@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_draws_depend_on_the_epoch_but_not_on_workers_or_ranks(wrapper: str) -> None:
    def draws(workers: int, world_size: int, epoch: int = 0) -> list[Any]:
        found: list[Any] = []
        for rank in range(world_size):
            loader = ordered(_loader(workers, _WRAPPERS[wrapper]), micro=4, world_size=world_size, rank=rank)
            loader.sampler.set_epoch(epoch)
            found += [sample for batch in loader for sample in batch]
        return sorted(found)

    one = draws(1, 1)
    assert draws(2, 2) == one
    later = draws(1, 1, epoch=1)
    assert [sample[0] for sample in later] == [sample[0] for sample in one]
    assert not {sample[1:] for sample in later} & {sample[1:] for sample in one}


@pytest.mark.parametrize("workers", [0, 1])
def test_start_of_an_epoch_does_not_use_the_trainings_generators(workers: int) -> None:
    # A checkpoint at the end of an epoch has the states from its start.
    loader = ordered(_loader(workers))
    before = capture()
    iterator = iter(loader)
    drawn = torch.rand(1)
    restore(before)
    assert torch.equal(torch.rand(1), drawn)
    del iterator


def test_samples_without_workers_use_the_trainings_generators() -> None:
    loader = ordered(_loader(0))
    before = capture()
    first = list(loader)
    restore(before)
    loader.sampler.place(0)
    assert list(loader) == first
    loader.sampler.place(0)
    assert list(loader) != first


def test_dataset_that_takes_no_attribute_is_not_changed() -> None:
    seed_each_sample([1, 2])


def test_seeded_index_is_pickled_with_its_seed() -> None:
    index = pickle.loads(pickle.dumps(SeededIndex(7, 2**63)))  # noqa: S301 -- made here
    assert (index, index.seed, [*"abcdefgh"][index]) == (7, 2**63, "h")


@given(st.lists(_WORD, min_size=1, max_size=3), st.integers(0, 2), _WORD)
def test_seed_depends_on_every_number_and_its_position(numbers: list[int], at: int, other: int) -> None:
    changed = list(numbers)
    changed[at % len(numbers)] = other
    assert (mix_seeds(*changed) == mix_seeds(*numbers)) == (changed == numbers)
    assert 0 <= mix_seeds(*numbers) < 2**64
