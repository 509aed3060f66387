"""Samplers that can start anywhere in an epoch: their order depends on seed, epoch and iteration only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from launcher.training.data.sample_seeds import SeededIndex, mix_seeds

# Largest seed that torch's generators accept, minus room to add an epoch.
SEED_MASK = 2**62 - 1


@dataclass(frozen=True, slots=True)
class Sharding:
    """How the samples of a loader are distributed to the ranks that share them.

    Attributes:
        seed: of the order.
        seeds_samples: return each index with a seed for the random draws of a loader worker.
        drop_last: leave out the samples that do not fill every rank, instead of repeating some.
    """

    world_size: int
    rank: int
    seed: int
    seeds_samples: bool = False
    drop_last: bool = False


class PlaceableSampler(DistributedSampler[Any]):
    """A sampler whose next iteration can start at any item of any iteration of any epoch.

    A loader has several iterations in an epoch if `CombinedLoader` starts it again. As this is a `DistributedSampler`,
    Lightning does not distribute the samples again.

    Attributes:
        generator: gives the seed of a loader's workers, which depends on seed, epoch and iteration only. Without it,
            a loader draws from the training's own generator when an epoch starts, which a resume would not repeat.
    """

    def __init__(self, dataset: Sized, sharding: Sharding, *, shuffle: bool) -> None:
        super().__init__(
            cast(Any, dataset),
            sharding.world_size,
            sharding.rank,
            shuffle=shuffle,
            seed=sharding.seed,
            drop_last=sharding.drop_last,
        )
        self._iteration = 0
        self._skip = 0
        self._seeds_samples = sharding.seeds_samples
        self.generator = torch.Generator()
        self.place(0)

    def place(self, epoch: int, iteration: int = 0, skip: int = 0) -> None:
        """Set the epoch and the iteration of it that is next, both from 0, and the number of its items to skip."""
        self.epoch, self._iteration, self._skip = epoch, iteration, skip
        self.generator.manual_seed(mix_seeds(self.seed, epoch, *_iteration_seeds(iteration)))

    @override
    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; does nothing for the current epoch."""
        # Lightning sets the epoch after it has created the iterator.
        if epoch != self.epoch:
            self.place(epoch)

    @override
    def __iter__(self) -> Iterator[Any]:
        # A generator, which starts with its first item: torch creates two iterators of a loader with workers.
        iteration, skip = self._iteration, self._skip
        self._iteration, self._skip = iteration + 1, 0
        yield from itertools.islice(self._items(iteration), skip, None)

    def _items(self, iteration: int) -> Iterator[Any]:
        raise NotImplementedError

    def _mix(self, *numbers: int) -> int:
        return mix_seeds(self.seed, self.epoch, *numbers)


def _iteration_seeds(iteration: int) -> tuple[int, ...]:
    """The first iteration adds nothing to a seed, as in earlier versions."""
    return (iteration,) if iteration else ()


class GlobalOrderSampler(PlaceableSampler):
    """Distributes one global order of the samples to the ranks in turn.

    The order depends on seed and epoch only, so block k of `global_batch_size` samples is optimizer step k on any
    number of ranks. The last samples of the epoch that do not fill a global batch are left out; without
    `global_batch_size` the sampler pads or drops as torch does. With `shuffle` each epoch has another order.
    """

    def __init__(
        self, dataset: Sized, sharding: Sharding, *, shuffle: bool, global_batch_size: int | None = None
    ) -> None:
        super().__init__(dataset, sharding, shuffle=shuffle)
        if global_batch_size is not None:
            self.total_size = len(dataset) // global_batch_size * global_batch_size
            self.num_samples = self.total_size // sharding.world_size
            self.drop_last = True

    @override
    def _items(self, iteration: int) -> Iterator[int]:
        own = self.seed
        if iteration:
            self.seed = self._mix(iteration) & SEED_MASK
        try:
            # torch creates the complete order at once.
            order = DistributedSampler.__iter__(self)
        finally:
            self.seed = own
        if not self._seeds_samples:
            return order
        epoch, more = self.epoch, _iteration_seeds(iteration)
        return (SeededIndex(index, mix_seeds(own, epoch, index, *more)) for index in order)


class SequentialOrder(GlobalOrderSampler, SequentialSampler):
    """The dataset's own order, distributed to the ranks. Lightning's `overfit_batches` keeps a `SequentialSampler`."""
