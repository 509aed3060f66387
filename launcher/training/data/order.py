"""The order of the training data: the same on any number of ranks, and placed anywhere in an epoch at no cost."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sized
from typing import Any, cast

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from launcher.core.errors import DataError
from launcher.training.data.samplers import (
    GlobalOrderSampler,
    PlaceableSampler,
    PlacedBatches,
    PlacedSampler,
    SequentialOrder,
)
from launcher.training.data.workers import start_worker
from strategies.batch import BatchSplit

# The user's loader of which ours is a copy.
_FROM = "_launcher_made_from"


class DataOrder:
    """Puts training loaders into one global order that can be resumed at any batch.

    A loader keeps its class and everything but its sampler. What the order of a loader that draws from a sampler or
    batch sampler of the user's own depends on is theirs: it is drawn from generators that are seeded for each epoch.

    Args:
        batch: the planned split.
        rank: this rank.
        seed: of the order.
        fixed_global_batch: whether the user fixed `global_batch_size`.
        distribute: whether each rank takes a share of the samples (`use_distributed_sampler`); otherwise the loaders
            are a rank's own.
        notice: told when a loader's place in an epoch cannot be restored.
        on_batch: told what made a loader, and its batch, where that is not the planned one.
    """

    def __init__(
        self,
        batch: BatchSplit,
        *,
        rank: int,
        seed: int,
        fixed_global_batch: bool,
        distribute: bool = True,
        notice: Callable[[str], None],
        on_batch: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        self.batch = batch
        self._rank = rank
        self._seed = seed
        self._fixed = fixed_global_batch
        self._ranks = (batch.world_size, rank) if distribute else (1, 0)
        self._distribute = distribute
        self._notice = notice
        self._told: set[str] = set()
        self._on_batch = on_batch
        self._corrected: set[int] = set()

    def tell(self, text: str) -> None:
        """Tell the user, once."""
        if text not in self._told:
            self._told.add(text)
            self._notice(text)

    def apply(self, make: Callable[[], Any], owner: str, *, overfit: bool = False) -> Any:
        """The loaders that `make` gives, in their order.

        Args:
            make: the user's `train_dataloader`.
            owner: its name.
            overfit: whether every epoch is to have the same batches, in the dataset's own order.

        Raises:
            DataError: there is no data, or not the planned batch.
        """
        try:
            loaders = make()
        except ValueError as error:
            # torch's RandomSampler says it of an empty dataset.
            if "num_samples=0" in str(error):
                raise DataError(
                    f"the training data is empty: {owner} made a loader of no sample; look at its data's path"
                ) from error
            raise
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
        several = len(combined.flattened) > 1
        found = [self._convert(loader, owner, overfit, several) for loader in combined.flattened]
        if combined is loaders:
            # A copy: the user's object may be asked for again, in another run of this process.
            combined = copy.copy(combined)
        combined.flattened = found
        return combined if isinstance(loaders, CombinedLoader) else combined.iterables

    def _convert(self, loader: Any, owner: str, overfit: bool, several: bool) -> Any:
        loader = vars(loader).get(_FROM, loader) if isinstance(loader, DataLoader) else loader
        if not isinstance(loader, DataLoader):
            kind = type(loader).__name__
            if self._fixed:
                self.tell(f"global_batch_size cannot be compared with what {owner} gives: a {kind}, no DataLoader")
            self._leave(kind if isinstance(loader, CombinedLoader) else f"{kind}, no DataLoader", loader)
            return loader
        self._check_size(loader, owner, several)
        reason = self._why_not(loader, overfit)
        if reason is not None:
            self._leave(reason, loader)
            return loader
        if type(loader).__iter__ not in (DataLoader.__iter__, StatefulDataLoader.__iter__):
            self.tell(f"{type(loader).__name__} iterates in a way of its own: a resume is exact only if it draws from "
                      "its sampler")  # fmt: skip
        made = copy.copy(loader)
        # torch forbids to set these on a loader that is ready.
        values = vars(made)
        values[_FROM] = loader
        if _is_default(loader):
            sampler: PlaceableSampler = self._sampler(loader, overfit)
            if loader.batch_sampler is not None:
                values["batch_sampler"] = BatchSampler(sampler, cast(int, loader.batch_size), loader.drop_last)
        else:
            batches: Any = loader.batch_sampler
            order = None
            if _is_known(_sampler_of(batches)):
                order = self._order_of(loader, isinstance(batches.sampler, RandomSampler), seeded=False)
            self._tell_of_own(batches)
            sampler = PlacedBatches(batches, order, seed=self._seed, seeded=loader.num_workers > 0)
            values["batch_sampler"] = sampler
        values["sampler"] = sampler
        values["generator"] = loader.generator or sampler.generator
        if loader.num_workers:
            values["worker_init_fn"] = functools.partial(start_worker, inner=loader.worker_init_fn, rank=self._rank)
        return made

    def _sampler(self, loader: DataLoader[Any], overfit: bool) -> PlaceableSampler:
        own, seeded = loader.sampler, loader.num_workers > 0
        if overfit or _is_known(own):
            return self._order_of(loader, type(own) is not SequentialSampler and not overfit, seeded=seeded)
        self._tell_of_own(own)
        # Such a one knows the ranks by itself.
        world_size, rank = (1, 0) if isinstance(own, DistributedSampler) else self._ranks
        return PlacedSampler(own, world_size, rank, batch_size=loader.batch_size or 1, seed=self._seed, seeded=seeded,
                             drop_last=loader.drop_last)  # fmt: skip

    def _order_of(self, loader: DataLoader[Any], shuffle: bool, *, seeded: bool) -> GlobalOrderSampler:
        return (GlobalOrderSampler if shuffle else SequentialOrder)(
            cast(Sized, loader.dataset),
            world_size=self._ranks[0],
            rank=self._ranks[1],
            shuffle=shuffle,
            seed=self._seed,
            global_batch_size=self.batch.global_batch_size if self._fixed and self._distribute else None,
            drop_last=loader.drop_last,
            seeded=seeded,
        )

    def _tell_of_own(self, sampler: Any) -> None:
        if type(sampler).__module__.partition(".")[0] != "torch":
            self.tell(f"the training data comes in the order of {type(sampler).__name__}: a resume repeats it if it "
                      "depends on set_epoch and on the generators of Python, NumPy and torch alone")  # fmt: skip

    def _leave(self, reason: str, loader: Any) -> None:
        if isinstance(loader, _Stateful):
            # Lightning saves the state of rank 0, behind what was fetched ahead.
            self.tell(f"the training loader is left as it is ({reason}): a resume gives all ranks the state that it "
                      "had on rank 0, which may be a batch ahead")  # fmt: skip
        else:
            self.tell(f"the training loader is left as it is ({reason}): a resume begins its epoch anew")

    def _tell_batch(self, owner: str, taken: int, several: bool) -> None:
        if several:
            planned = self.batch.micro_batch_size
            self.tell(f"{owner} made a loader of {taken} samples, not of the {planned} that the plan has for each rank")
        elif taken not in self._corrected:
            # Loaders may be made anew in every epoch.
            self._corrected.add(taken)
            self._on_batch(owner, taken)

    def _check_size(self, loader: DataLoader[Any], owner: str, several: bool) -> None:
        length = None if isinstance(loader.dataset, IterableDataset) else len(cast(Sized, loader.dataset))
        if length == 0:
            raise DataError(f"the training data is empty: {owner} made a loader of no sample; look at its data's path")
        planned, ranks = self.batch.global_batch_size, self.batch.world_size
        taken = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if not self._fixed:
            if planned is not None and taken is not None and taken != self.batch.micro_batch_size:
                self._tell_batch(owner, taken, several)
            return
        if taken != self.batch.micro_batch_size:
            raise DataError(
                f"global_batch_size {planned} needs {self.batch.micro_batch_size} samples at once on each of "
                f"{ranks} ranks, but {owner} made a loader of {taken}; give that class an argument "
                f"`batch_size` and use it, or choose another global_batch_size or trainer.accumulate_grad_batches"
            )
        if length is not None and planned is not None and length < planned:
            raise DataError(
                f"the training data has {length} samples, fewer than one global_batch_size {planned}; "
                "give more data, or set a smaller global_batch_size"
            )

    def _why_not(self, loader: DataLoader[Any], overfit: bool) -> str | None:
        """Why a loader cannot be placed; None if it can."""
        if isinstance(loader.dataset, IterableDataset):
            return "its dataset is iterable"
        drawn = loader.sampler if _is_default(loader) else loader.batch_sampler
        if sized_len(drawn) is None:
            return f"its {type(drawn).__name__} has no length"
        if _is_default(loader):
            return None
        if overfit or (self._ranks[0] > 1 and not _is_known(_sampler_of(drawn))):
            return f"it has a {type(drawn).__name__} of its own"
        return None


def is_placeable(loader: Any) -> bool:
    """Whether the loader can begin anywhere in an epoch."""
    return isinstance(loader, DataLoader) and isinstance(loader.sampler, PlaceableSampler)


def place(combined: CombinedLoader, epoch: int, batches: int) -> None:
    """Let the next pass over the loaders begin behind a number of the epoch's batches.

    Args:
        combined: the loaders, of which those that cannot be placed are left alone.
        epoch: from 0.
        batches: that the combination has given in this epoch.
    """
    for loader in combined.flattened:
        if not is_placeable(loader):
            continue
        iteration, given = 0, batches
        if combined._mode == "max_size_cycle":
            # At its end a loader is begun again with the next batch only, if there is one.
            iteration = max(batches - 1, 0) // max(len(loader), 1)
            given = batches - iteration * len(loader)
        sampler = loader.sampler
        size = 1 if isinstance(sampler, PlacedBatches) else loader.batch_size or 1
        sampler.place(epoch, iteration, given * size)


def _is_default(loader: DataLoader[Any]) -> bool:
    """Whether torch made the batch sampler, of the loader's sampler and batch size."""
    return loader.batch_sampler is None or loader.batch_size is not None


def _sampler_of(batches: Any) -> Any:
    """The sampler of a batch sampler, where it can be replaced: a property of its class cannot."""
    return getattr(batches, "__dict__", {}).get("sampler")


def _is_known(sampler: Any) -> bool:
    """Whether it gives each sample once, in order or shuffled."""
    if type(sampler) in (RandomSampler, StatefulRandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler
