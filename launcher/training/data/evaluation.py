"""The data of an evaluation on several ranks: each sample once, although Lightning's sampler repeats some."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sized
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource, _get_distributed_sampler
from lightning.pytorch.utilities.data import _is_dataloader_shuffled
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from launcher.training.data.workers import keep_workers_at_ctrl_c


class SharedOnce(DistributedSampler[Any]):
    """The batches of one rank, as many as on every other rank, which collectives in a step need.

    The numbers of samples of the ranks differ by one at most; each rank needs one. `batch_size` is the largest micro
    batch.
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
    """Make `owner.<method>()` return loaders of this rank's samples; loaders with special samplers are not changed."""
    original = getattr(owner, method)

    def share(loader: DataLoader[Any]) -> DataLoader[Any]:
        if not _can_share(loader, world_size):
            return loader
        batches = SharedOnce(len(cast(Sized, loader.dataset)), loader.batch_size or 1, world_size, rank)
        # The sampler's type keeps Lightning from distributing the data again.
        return _with_samplers(loader, batches, batches)

    @functools.wraps(original)
    def shared() -> Any:
        return apply_to_collection(original(), DataLoader, share)

    object.__setattr__(owner, method, shared)


class SharedSource(_DataLoaderSource):
    """The source of evaluation loaders, which sets Lightning's distributed sampler on a copy of the loader.

    Lightning itself creates the loader again from its constructor's arguments, which not every class allows.
    """

    def __init__(self, name: str, trainer: pl.Trainer) -> None:
        super().__init__(None, name)
        self._trainer = trainer

    @override
    def dataloader(self) -> Any:
        return apply_to_collection(super().dataloader(), DataLoader, self._share)

    def _share(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        trainer = self._trainer
        keep_workers_at_ctrl_c(loader)
        if loader.batch_size is None or not trainer._data_connector._requires_distributed_sampler(loader):
            return loader
        sampler = _get_distributed_sampler(
            loader,
            _is_dataloader_shuffled(loader),
            overfit_batches=getattr(trainer, "overfit_batches", 0),
            mode=trainer.state.stage,
            **(trainer.distributed_sampler_kwargs or {}),
        )
        return _with_samplers(loader, sampler, BatchSampler(sampler, loader.batch_size, loader.drop_last))


def _with_samplers(loader: DataLoader[Any], sampler: Any, batch_sampler: Any) -> DataLoader[Any]:
    """A copy of the loader, of the same class, with these samplers."""
    made = copy.copy(loader)
    # torch does not allow to set these attributes of a loader after its construction.
    vars(made).update(sampler=sampler, batch_sampler=batch_sampler)
    return made


def _can_share(loader: DataLoader[Any], world_size: int) -> bool:
    is_usual = type(loader.sampler) in (SequentialSampler, RandomSampler)
    if not is_usual or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None or loader.drop_last:
        return False
    size = len(cast(Sized, loader.dataset))
    if isinstance(loader.sampler, RandomSampler) and (loader.sampler.replacement or len(loader.sampler) != size):
        return False
    # With fewer samples than batches, a rank would have an empty batch.
    batches = math.ceil(math.ceil(size / world_size) / loader.batch_size)
    return size // world_size >= batches > 0
