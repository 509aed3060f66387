"""Placeable versions of the user's samplers and batch samplers, which draw from seeded generators."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from launcher.training.data.sample_seeds import SeededIndex, mix_seeds, seed_all
from launcher.training.data.samplers import SEED_MASK, PlaceableSampler, Sharding

# The attributes of the placeable sampler; all others are read from and written to the user's sampler.
_OWN_ATTRIBUTES = ("dataset", "num_replicas", "rank", "epoch", "drop_last", "num_samples", "total_size", "shuffle",
                   "seed", "generator")  # fmt: skip


class _UserSampler(PlaceableSampler):
    """Draws `at_once` items at a time from a sampler of the user, with generators that are seeded for it.

    The user's object stays in use: attributes that the user changes on it or on this one during the training take
    effect as in plain Lightning. If given, `order` replaces `inner.sampler` while items are drawn.
    """

    def __init__(self, inner: Any, sharding: Sharding, at_once: int, order: PlaceableSampler | None = None) -> None:
        self._inner, self._order = inner, order
        # torch's samplers do not depend on the state of a training.
        self._at_once = len(inner) if type(inner).__module__.startswith("torch.") and order is None else at_once
        owners = (inner, getattr(inner, "sampler", None) if order is None else None)
        own = [g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)]
        self._own_generators = [] if order is not None else [(g, g.initial_seed()) for g in own]
        with self._in_order():
            super().__init__(inner, sharding, shuffle=False)

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
        # The first iteration adds nothing to the seed, as in earlier versions.
        seed = self._mix(iteration) if iteration else self._mix()
        for generator, own_seed in self._own_generators:
            generator.manual_seed(mix_seeds(own_seed, seed) & SEED_MASK)
        generators = _Generators(seed)
        with self._in_order(), generators:
            items = itertools.islice(iter(self._inner), len(self._inner))
        while True:
            with self._in_order(), generators:
                drawn = list(itertools.islice(items, self._at_once))
            yield from drawn
            if len(drawn) < self._at_once:
                return

    @contextmanager
    def _in_order(self) -> Generator[None]:
        """Give a batch sampler over torch's own sampler the length and the batches of this rank's share."""
        if self._order is None:
            yield
            return
        own, self._inner.sampler = self._inner.sampler, self._order
        try:
            yield
        finally:
            self._inner.sampler = own

    def _with_seed(self, index: Any, place: int, iteration: int) -> Any:
        if not isinstance(index, int):
            return index
        return SeededIndex(index, self._mix(index, iteration, place))

    def __getattr__(self, name: str) -> Any:
        # The user's own code may read attributes of its sampler.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in _OWN_ATTRIBUTES:
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)


class PlacedSampler(_UserSampler):
    """A sampler of the user, distributed to the ranks."""

    def __init__(self, inner: Any, sharding: Sharding, batch_size: int) -> None:
        super().__init__(inner, sharding, batch_size * sharding.world_size)

    @override
    def _items(self, iteration: int) -> Iterator[Any]:
        return itertools.islice(self._padded(iteration), self.rank, self.total_size, self.num_replicas)

    def _padded(self, iteration: int) -> Iterator[Any]:
        """Repeat samples from the start, as torch does, so that all ranks get the same number."""
        first: list[Any] = []
        drawn = 0
        for index in self._draw(iteration):
            # A sample that is drawn twice gets different augmentations.
            item = self._with_seed(index, drawn, iteration) if self._seeds_samples else index
            drawn += 1
            if len(first) < self.num_replicas:
                first.append(item)
            yield item
        yield from itertools.islice(itertools.cycle(first), -drawn % self.num_replicas)


class PlacedBatches(_UserSampler):
    """A batch sampler of the user; its batches are not distributed, only the samples of `order`."""

    def __init__(self, inner: Any, sharding: Sharding, order: PlaceableSampler | None) -> None:
        alone = dataclasses.replace(sharding, world_size=1, rank=0, drop_last=False)
        super().__init__(inner, alone, at_once=1, order=order)

    @override
    def _items(self, iteration: int) -> Iterator[Any]:
        for place, batch in enumerate(self._draw(iteration)):
            if self._seeds_samples and isinstance(batch, list):
                yield [self._with_seed(index, place, iteration) for index in batch]
            else:
                yield batch


class _Generators:
    """Gives a sampler generators of Python, NumPy and torch that continue from its last draw."""

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
