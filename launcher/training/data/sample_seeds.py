"""Random draws of loader workers, which depend on seed, epoch and sample only, so a resumed epoch repeats them.

A worker that starts in the middle of an epoch has not made the earlier draws of that epoch. So each sample's index has
a seed, which the worker's generators get before it reads the sample. Augmentation does not depend on the number of
workers or ranks either. Without workers, samples draw from the training's own generators, which a checkpoint contains.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

_MASK = 2**64 - 1


class SeededIndex(int):
    """A sample's index with the seed for its random draws, which has 64 bits."""

    seed: int

    def __new__(cls, index: int, seed: int) -> SeededIndex:
        """Create an index with a seed."""
        made = super().__new__(cls, index)
        made.seed = seed
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededIndex, (int(self), self.seed)


def mix_seeds(*numbers: int) -> int:
    """64 bits that depend on all numbers and their order; the finalizer of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_each_sample(dataset: Any) -> None:
    """Seed the generators of a loader's worker before each sample is read.

    For a dataset that reads a batch at once (`__getitems__`) they are seeded before each batch. torch's `Subset` only
    forwards its indices, so it reads sample by sample if its dataset does. A dataset without `__dict__`, such as a
    list, has no random draws and is not changed, nor are generators that the dataset created itself.
    """
    if not hasattr(dataset, "__dict__"):
        return
    own: Callable[[list[int]], Sequence[Any]] | None = getattr(dataset, "__getitems__", None)
    reads_one_by_one = own is None or _only_forwards(dataset)

    def read(indices: list[int]) -> Sequence[Any]:
        if own is None or reads_one_by_one:
            return [_read_one(dataset, index) for index in indices]
        _seed_for(indices[0])
        return own([int(index) if isinstance(index, SeededIndex) else index for index in indices])

    # torch prefers this method.
    vars(dataset)["__getitems__"] = read


def _only_forwards(dataset: Any) -> bool:
    """Whether the dataset is a `Subset` of one that reads sample by sample."""
    while type(dataset).__getitem__ is Subset.__getitem__ and type(dataset).__getitems__ is Subset.__getitems__:
        dataset = dataset.dataset
        if not hasattr(dataset, "__getitems__"):
            return True
        if not isinstance(dataset, Subset):
            return False
    return False


def _read_one(dataset: Any, index: Any) -> Any:
    _seed_for(index)
    return dataset[int(index) if isinstance(index, SeededIndex) else index]


def _seed_for(index: Any) -> None:
    # An index without a seed comes from a sampler that replaced the launcher's.
    if isinstance(index, SeededIndex):
        seed_all(index.seed)


def seed_all(seed: int) -> None:
    """Seed the three generators of this process; `torch.manual_seed` would also look for devices."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
