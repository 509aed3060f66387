"""Random draws of loader workers: of seed, epoch and sample alone, so that a resumed epoch repeats them.

A worker that is started in the middle of an epoch cannot know what it would have drawn until then. So each sample's
index carries a seed, and a worker sets its generators to it before it reads the sample: augmentation does not depend
on the number of workers or ranks either. In a process without workers the training's own generators are drawn from,
which a checkpoint holds.
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
    """A sample's index with the seed of what is drawn at random for it.

    Attributes:
        seed: 64 bits.
    """

    seed: int

    def __new__(cls, index: int, seed: int) -> SeededIndex:
        """An index that knows its seed."""
        made = super().__new__(cls, index)
        made.seed = seed
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededIndex, (int(self), self.seed)


def mixed(*numbers: int) -> int:
    """64 bits that depend on all of the numbers and their order; the finalizer of SplitMix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_each_sample(dataset: Any) -> None:
    """In a loader's worker: from now on the worker's generators are set before each sample is read.

    A dataset that reads a whole batch at once (`__getitems__`) has them set before each batch; torch's `Subset` only
    hands its indices on, so it reads sample by sample if the dataset below does. One that takes no attribute, such as a
    list, draws nothing and is left as it is. Generators that the dataset made itself are its own.

    Args:
        dataset: the worker's own copy.
    """
    if not hasattr(dataset, "__dict__"):
        return
    own: Callable[[list[int]], Sequence[Any]] | None = getattr(dataset, "__getitems__", None)
    by_sample = own is None or _only_hands_on(dataset)

    def read(indices: list[int]) -> Sequence[Any]:
        if own is None or by_sample:
            return [_read_one(dataset, index) for index in indices]
        _set(indices[0])
        return own([int(index) if isinstance(index, SeededIndex) else index for index in indices])

    # torch looks here first.
    vars(dataset)["__getitems__"] = read


def _only_hands_on(dataset: Any) -> bool:
    """Whether the dataset is a `Subset` of one that reads sample by sample."""
    while type(dataset).__getitem__ is Subset.__getitem__ and type(dataset).__getitems__ is Subset.__getitems__:
        dataset = dataset.dataset
        if not hasattr(dataset, "__getitems__"):
            return True
        if not isinstance(dataset, Subset):
            return False
    return False


def _read_one(dataset: Any, index: Any) -> Any:
    _set(index)
    return dataset[int(index) if isinstance(index, SeededIndex) else index]


def _set(index: Any) -> None:
    # An index without a seed comes from a sampler that was put in place of ours.
    if isinstance(index, SeededIndex):
        seed_all(index.seed)


def seed_all(seed: int) -> None:
    """Set this process's three generators; `torch.manual_seed` would look for devices, too."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
