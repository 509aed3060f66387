"""The order of the training data: the same on any number of ranks, and resumable in the middle of an epoch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from launcher.errors import DataError
from launcher.sample_seeds import SeededIndex, mixed
from launcher.worker_signals import start_worker
from strategies.batch import BatchSplit

# The user's own method, kept with the one that takes its place.
_ORIGINAL = "launcher_original"


class GlobalOrderSampler(DistributedSampler[Any]):
    """Deals one global order of the samples to the ranks, like cards.

    The order depends on seed and epoch alone, so block k of `global_batch_size` samples is optimizer step k on any
    number of ranks. Its state counts samples over all ranks.

    Args:
        dataset: has a length.
        world_size: number of ranks.
        rank: this rank.
        shuffle: a new order in each epoch, or the dataset's own.
        seed: of the order.
        global_batch_size: leaves out the epoch's last samples that don't fill a global batch; None pads as torch does.
        drop_last: with None above: leaves out what doesn't fill every rank, instead of repeating samples.
        seeded: hand out each index with a seed for what a worker draws at random for it.

    Attributes:
        generator: for the seed of a loader's workers, which depends on seed and epoch alone. A loader without it draws
            from the training's own generator when an epoch begins, which a resume at that point would not repeat.
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
        super().__init__(cast(Any, dataset), world_size, rank, shuffle, seed, drop_last)
        if global_batch_size is not None:
            self.total_size = len(dataset) // global_batch_size * global_batch_size
            self.num_samples = self.total_size // world_size
            self.drop_last = True
        self._taken = 0
        self._skip = 0
        self._seeded = seeded
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, and the seeds that go with it."""
        super().set_epoch(epoch)
        self.generator.manual_seed(mixed(self.seed, epoch))

    def __iter__(self) -> Iterator[int]:
        # A generator: Lightning sets the epoch after it made the iterator.
        self._taken, self._skip = self._skip, 0
        for index in itertools.islice(super().__iter__(), self._taken, None):
            self._taken += 1
            yield SeededIndex(index, mixed(self.seed, self.epoch, index)) if self._seeded else index

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its samples all ranks together have taken."""
        return {"epoch": self.epoch, "samples": self._taken * self.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration behind the samples that were taken; in the next epoch if that was all of them.

        The epoch counts too: a loader with workers draws its first samples before Lightning sets the epoch.
        """
        self._skip = state["samples"] // self.num_replicas
        epoch = state["epoch"]
        if self._skip >= self.num_samples:
            self._skip, epoch = 0, epoch + 1
        self.set_epoch(epoch)


def order_training_data(
    owner: pl.LightningDataModule | pl.LightningModule,
    batch: BatchSplit,
    *,
    rank: int,
    seed: int,
    fixed_global_batch: bool,
    resume_states: Sequence[Mapping[str, Any]] = (),
    notice: Callable[[str], None],
) -> None:
    """Make `owner.train_dataloader()` return loaders in the global order that can be resumed within an epoch.

    Args:
        owner: whose `train_dataloader` feeds the training.
        batch: the planned split.
        rank: this rank.
        seed: of the order.
        fixed_global_batch: whether the user fixed `global_batch_size`.
        resume_states: where the loaders were, in their order. Lightning restores it too, but too late if
            `configure_optimizers` asks for `trainer.estimated_stepping_batches`, which makes the loaders.
        notice: told when a loader has to be left as it is.
    """
    # An earlier training of this process may have been given the same object.
    original = getattr(owner.train_dataloader, _ORIGINAL, owner.train_dataloader)
    states = list(resume_states)

    @functools.wraps(original)
    def train_dataloader() -> Any:
        try:
            loaders = original()
        except ValueError as error:
            # torch's RandomSampler says it of an empty dataset.
            if "num_samples=0" in str(error):
                raise DataError(
                    f"the training data is empty: {_where(owner)} made a loader of no sample; look at its data's path"
                ) from error
            raise
        return apply_to_collection(loaders, DataLoader, convert)

    def convert(loader: DataLoader[Any]) -> DataLoader[Any]:
        _check_size(loader, batch, fixed_global_batch, _where(owner))
        reason = _why_not(loader)
        if reason is not None:
            notice(f"the training loader is left as it is ({reason}): a resume begins its epoch anew")
            return loader
        sampler = GlobalOrderSampler(
            cast(Sized, loader.dataset),
            world_size=batch.world_size,
            rank=rank,
            shuffle=isinstance(loader.sampler, RandomSampler),
            seed=seed,
            global_batch_size=batch.global_batch_size if fixed_global_batch else None,
            drop_last=loader.drop_last,
            seeded=loader.num_workers > 0,
        )
        stateful = _stateful(loader, sampler, rank)
        if states:
            stateful.load_state_dict(dict(states.pop(0)))
        return stateful

    vars(train_dataloader)[_ORIGINAL] = original
    object.__setattr__(owner, "train_dataloader", train_dataloader)


def _where(owner: Any) -> str:
    return f"{type(owner).__name__}.train_dataloader"


def _check_size(loader: DataLoader[Any], batch: BatchSplit, fixed: bool, where: str) -> None:
    length = None if isinstance(loader.dataset, IterableDataset) else len(cast(Sized, loader.dataset))
    if length == 0:
        raise DataError(f"the training data is empty: {where} made a loader of no sample; look at its data's path")
    if not fixed:
        return
    if loader.batch_size != batch.micro_batch_size:
        raise DataError(
            f"global_batch_size {batch.global_batch_size} needs {batch.micro_batch_size} samples at once on each of "
            f"{batch.world_size} ranks, but {where} made a loader of {loader.batch_size}; give that class an argument "
            f"`batch_size` and use it, or choose another global_batch_size or trainer.accumulate_grad_batches"
        )
    if length is not None and batch.global_batch_size is not None and length < batch.global_batch_size:
        raise DataError(
            f"the training data has {length} samples, fewer than one global_batch_size {batch.global_batch_size}; "
            "give more data, or set a smaller global_batch_size"
        )


def _why_not(loader: DataLoader[Any]) -> str | None:
    """Why a loader cannot be made anew with another sampler; None if it can."""
    if type(loader) not in (DataLoader, StatefulDataLoader):
        return f"it is a {type(loader).__name__} of its own"
    if isinstance(loader.dataset, IterableDataset):
        return "its dataset is iterable"
    if loader.batch_size is None:
        return "it has a batch sampler of its own"
    sampler = loader.sampler
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(cast(Sized, loader.dataset))
        return None if whole else "its sampler draws with replacement or a part of the data"
    return None if type(sampler) is SequentialSampler else f"it has a {type(sampler).__name__}"


def _stateful(loader: DataLoader[Any], sampler: GlobalOrderSampler, rank: int) -> StatefulDataLoader[Any]:
    """The same loader with another sampler, able to say and restore where it is."""
    workers = loader.num_workers
    return StatefulDataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=functools.partial(start_worker, inner=loader.worker_init_fn, rank=rank) if workers else None,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=loader.generator or sampler.generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers,
    )
