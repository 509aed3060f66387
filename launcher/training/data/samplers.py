"""Samplers that begin anywhere in an epoch: their order is of seed, epoch and iteration alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from launcher.training.data.sample_seeds import SeededIndex, mixed, seed_all

# What torch's generators take as a seed, with room to add an epoch.
_SEEDS = 2**62 - 1
# What a placeable sampler has of its own, by torch's names; all else is the user's sampler's.
_OURS = ("dataset", "num_replicas", "rank", "epoch", "drop_last", "num_samples", "total_size", "shuffle", "seed",
         "generator")  # fmt: skip


class PlaceableSampler(DistributedSampler[Any]):
    """Knows epoch, iteration and how much of it to leave out; each iteration begins there, the next one whole.

    A loader is iterated several times in an epoch where `CombinedLoader` begins it again. It is a `DistributedSampler`
    so that Lightning takes it for one that knows the ranks.

    Attributes:
        generator: for the seed of a loader's workers, which depends on seed, epoch and iteration alone. A loader
            without it draws from the training's own generator when an epoch begins, which a resume would not repeat.
    """

    def __init__(self, dataset: Sized, world_size: int, rank: int, *, seed: int, seeded: bool, **options: Any) -> None:
        super().__init__(cast(Any, dataset), world_size, rank, seed=seed, **options)
        self._iteration = 0
        self._skip = 0
        self._seeded = seeded
        self.generator = torch.Generator()
        self.place(0)

    def place(self, epoch: int, iteration: int = 0, skip: int = 0) -> None:
        """Where the next iteration begins.

        Args:
            epoch: from 0.
            iteration: of this epoch, from 0.
            skip: how many of its items are left out.
        """
        self.epoch, self._iteration, self._skip = epoch, iteration, skip
        self.generator.manual_seed(mixed(self.seed, epoch, *([iteration] if iteration else [])))

    @override
    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; without effect in the epoch that it is in."""
        # Lightning sets the epoch after it made the iterator.
        if epoch != self.epoch:
            self.place(epoch)

    @override
    def __iter__(self) -> Iterator[Any]:
        # A generator, which begins with its first item: torch makes two iterators of a loader with workers.
        iteration, skip = self._iteration, self._skip
        self._iteration, self._skip = iteration + 1, 0
        yield from itertools.islice(self._items(iteration), skip, None)

    def _items(self, iteration: int) -> Iterator[Any]:
        raise NotImplementedError

    def _seeds_of(self, iteration: int) -> tuple[int, ...]:
        return (iteration,) if iteration else ()


class GlobalOrderSampler(PlaceableSampler):
    """Deals one global order of the samples to the ranks, like cards.

    The order depends on seed and epoch alone, so block k of `global_batch_size` samples is optimizer step k on any
    number of ranks.

    Args:
        dataset: has a length.
        world_size: number of ranks.
        rank: this rank.
        shuffle: a new order in each epoch, or the dataset's own.
        seed: of the order.
        global_batch_size: leaves out the epoch's last samples that don't fill a global batch; None pads as torch does.
        drop_last: with None above: leaves out what doesn't fill every rank, instead of repeating samples.
        seeded: hand out each index with a seed for what a worker draws at random for it.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        world_size: int,
        rank: int,
        shuffle: bool,
        seed: int,
        global_batch_size: int | None,
        drop_last: bool,
        seeded: bool = False,
    ) -> None:
        super().__init__(dataset, world_size, rank, seed=seed, seeded=seeded, shuffle=shuffle, drop_last=drop_last)
        if global_batch_size is not None:
            self.total_size = len(dataset) // global_batch_size * global_batch_size
            self.num_samples = self.total_size // world_size
            self.drop_last = True

    @override
    def _items(self, iteration: int) -> Iterator[int]:
        own = self.seed
        if iteration:
            self.seed = mixed(own, self.epoch, iteration) & _SEEDS
        try:
            # torch makes the whole order at once.
            order = DistributedSampler.__iter__(self)
        finally:
            self.seed = own
        if not self._seeded:
            return order
        epoch, more = self.epoch, self._seeds_of(iteration)
        return (SeededIndex(index, mixed(own, epoch, index, *more)) for index in order)


class SequentialOrder(GlobalOrderSampler, SequentialSampler):
    """The dataset's own order, dealt to the ranks; Lightning's `overfit_batches` takes it as it is."""


class _Drawn(PlaceableSampler):
    """Draws what a sampler of the user's gives, from generators that are seeded for it, a batch at a time.

    The user's object stays in use: what it reads while it is drawn from, and what the user sets on it or on this one
    during the training, takes effect as under plain Lightning.

    Args:
        inner: the user's; has a length.
        at_once: items that are drawn at a time.
        order: stands for `inner.sampler` while it is drawn from; None leaves that.
    """

    def __init__(
        self, inner: Any, at_once: int, *options: int, order: PlaceableSampler | None = None, **more: Any
    ) -> None:
        self._inner, self._order = inner, order
        # torch's own samplers look at nothing that a training changes.
        self._at_once = len(inner) if type(inner).__module__.startswith("torch.") and order is None else at_once
        owners = (inner, getattr(inner, "sampler", None) if order is None else None)
        own = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
        self._own_generators = [] if order is not None else [(g, g.initial_seed()) for g in own]
        with self._in_order():
            super().__init__(inner, *options, shuffle=False, **more)

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._set_inner(epoch)

    @override
    def place(self, epoch: int, iteration: int = 0, skip: int = 0) -> None:
        super().place(epoch, iteration, skip)
        self._set_inner(epoch)

    def _set_inner(self, epoch: int) -> None:
        for inner in (self._inner, getattr(self._inner, "sampler", None)):
            if callable(set_epoch := getattr(inner, "set_epoch", None)):
                set_epoch(epoch)

    def _draw(self, iteration: int) -> Iterator[Any]:
        if self._order is not None:
            self._order.place(self.epoch, iteration)
        seed = mixed(self.seed, self.epoch, *self._seeds_of(iteration))
        for generator, own_seed in self._own_generators:
            generator.manual_seed(mixed(own_seed, seed) & _SEEDS)
        generators = _Generators(seed)
        with self._drawing(generators):
            items = itertools.islice(iter(self._inner), len(self._inner))
        while True:
            with self._drawing(generators):
                drawn = list(itertools.islice(items, self._at_once))
            yield from drawn
            if len(drawn) < self._at_once:
                return

    @contextmanager
    def _drawing(self, generators: _Generators) -> Generator[None]:
        with self._in_order(), generators:
            yield

    @contextmanager
    def _in_order(self) -> Generator[None]:
        """A batch sampler over torch's own sampler: its length and its batches are of this rank's share."""
        if self._order is None:
            yield
            return
        own, self._inner.sampler = self._inner.sampler, self._order
        try:
            yield
        finally:
            self._inner.sampler = own

    def __getattr__(self, name: str) -> Any:
        # What the user's own code asks of its sampler.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in _OURS:
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)


class PlacedSampler(_Drawn):
    """A sampler of the user's, dealt to the ranks.

    Args:
        inner: the user's; has a length.
        world_size: number of ranks.
        rank: this rank.
        batch_size: samples that a rank takes at once.
        seed: of the draws.
        drop_last: leave out what doesn't fill every rank, instead of repeating samples.
        seeded: see `GlobalOrderSampler`.
    """

    def __init__(
        self, inner: Any, world_size: int, rank: int, *, batch_size: int, seed: int, seeded: bool, drop_last: bool
    ) -> None:
        super().__init__(
            inner, batch_size * world_size, world_size, rank, seed=seed, seeded=seeded, drop_last=drop_last
        )

    @override
    def _items(self, iteration: int) -> Iterator[Any]:
        return itertools.islice(self._padded(iteration), self.rank, self.total_size, self.num_replicas)

    def _padded(self, iteration: int) -> Iterator[Any]:
        """As torch does it, from the beginning of the order, so that all ranks get equally many."""
        first: list[Any] = []
        drawn = 0
        for index in self._draw(iteration):
            # A sample that is drawn twice has other augmentations.
            item = self._with_seed(index, drawn, iteration) if self._seeded else index
            drawn += 1
            if len(first) < self.num_replicas:
                first.append(item)
            yield item
        yield from itertools.islice(itertools.cycle(first), -drawn % self.num_replicas)

    def _with_seed(self, index: Any, place: int, iteration: int) -> Any:
        if not isinstance(index, int):
            return index
        return SeededIndex(index, mixed(self.seed, self.epoch, index, iteration, place))


class PlacedBatches(_Drawn):
    """A batch sampler of the user's.

    Args:
        inner: the user's; has a length.
        order: stands for its `sampler` while it is drawn from; None leaves that.
        seed: of the draws.
        seeded: see `GlobalOrderSampler`.
    """

    def __init__(self, inner: Any, order: PlaceableSampler | None, *, seed: int, seeded: bool) -> None:
        super().__init__(inner, 1, 1, 0, order=order, seed=seed, seeded=seeded, drop_last=False)

    @override
    def _items(self, iteration: int) -> Iterator[Any]:
        for place, batch in enumerate(self._draw(iteration)):
            if self._seeded and isinstance(batch, list):
                yield [self._with_seed(index, place, iteration) for index in batch]
            else:
                yield batch

    _with_seed = PlacedSampler._with_seed


class _Generators:
    """Python's, NumPy's and torch's generators as a sampler sees them: entered, they go on where it left them.

    Args:
        seed: where they begin.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: tuple[Any, ...] | None = None
        self._outside: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._outside = _generator_states()
        if self._inside is None:
            seed_all(self._seed)
        else:
            _set_generators(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = _generator_states()
        _set_generators(self._outside)


def _generator_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state()


def _set_generators(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.random.set_rng_state(states[2])
