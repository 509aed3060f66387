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

    A dataset that reads a whole batch at once (`__getitems__`) has them set before each batch. One that takes no
    attribute, such as a list, draws nothing and is left as it is. Generators that the dataset made itself are its own.

    Args:
        dataset: the worker's own copy.
    """
    if not hasattr(dataset, "__dict__"):
        return
    own: Callable[[list[int]], Sequence[Any]] | None = getattr(dataset, "__getitems__", None)

    def read(indices: list[SeededIndex]) -> Sequence[Any]:
        if own is not None:
            _seed(indices[0].seed)
            return own([int(index) for index in indices])
        return [_read_one(dataset, index) for index in indices]

    # torch looks here first.
    vars(dataset)["__getitems__"] = read


def _read_one(dataset: Any, index: SeededIndex) -> Any:
    _seed(index.seed)
    return dataset[int(index)]


def _seed(seed: int) -> None:
    """Set this process's three generators; `torch.manual_seed` would look for devices, too."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
