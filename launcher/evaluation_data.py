"""The data of an evaluation on several ranks: each sample once, where Lightning's own sampler repeats some."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sized
from typing import Any, cast

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler


class SharedOnce(DistributedSampler[Any]):
    """Batches of one rank: its share of the samples, in as many batches as every other rank has.

    The ranks' shares differ by one sample at most. Equal numbers of batches matter to collectives in a step.

    Args:
        size: samples in all; at least one for each rank.
        batch_size: samples that a rank takes at once, at most.
        world_size: number of ranks.
        rank: this rank.
    """

    def __init__(self, size: int, batch_size: int, world_size: int, rank: int) -> None:
        super().__init__(cast(Any, range(size)), world_size, rank, shuffle=False)
        self._own = range(rank, size, world_size)
        self._batches = math.ceil(math.ceil(size / world_size) / batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        for n in range(self._batches):
            first, end = (place * len(self._own) // self._batches for place in (n, n + 1))
            yield list(self._own[first:end])


def share_evaluation_data(
    owner: pl.LightningDataModule | pl.LightningModule, method: str, world_size: int, rank: int
) -> None:
    """Make `owner.<method>()` return loaders of this rank's share; other loaders than usual ones stay as they are.

    Args:
        owner: has the loaders.
        method: `val_dataloader` or `test_dataloader`.
        world_size: number of ranks.
        rank: this rank.
    """
    original = getattr(owner, method)

    def share(loader: DataLoader[Any]) -> DataLoader[Any]:
        if not _can_share(loader, world_size):
            return loader
        batches = SharedOnce(len(cast(Sized, loader.dataset)), loader.batch_size or 1, world_size, rank)
        workers = loader.num_workers
        made: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=loader.persistent_workers,
        )
        # By this Lightning knows that the data is divided already.
        vars(made)["sampler"] = batches
        return made

    @functools.wraps(original)
    def shared() -> Any:
        return apply_to_collection(original(), DataLoader, share)

    object.__setattr__(owner, method, shared)


def _can_share(loader: DataLoader[Any], world_size: int) -> bool:
    usual = type(loader) is DataLoader and type(loader.sampler) in (SequentialSampler, RandomSampler)
    if not usual or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None or loader.drop_last:
        return False
    size = len(cast(Sized, loader.dataset))
    if isinstance(loader.sampler, RandomSampler) and (loader.sampler.replacement or len(loader.sampler) != size):
        return False
    # With fewer samples than batches on all ranks a rank would have an empty one.
    batches = math.ceil(math.ceil(size / world_size) / loader.batch_size)
    return size // world_size >= batches > 0
