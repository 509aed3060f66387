"""The order of the training data: the same on any number of ranks, and resumable at any batch without reading data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from launcher.core.errors import DataError
from launcher.training.data.samplers import GlobalOrderSampler, PlaceableSampler, SequentialOrder, Sharding
from launcher.training.data.undivided import describe_undivided, find_undivided
from launcher.training.data.user_samplers import PlacedBatches, PlacedSampler
from launcher.training.data.workers import keep_workers_at_ctrl_c, start_worker
from strategies.batch import BatchSplit

if TYPE_CHECKING:
    from launcher.training.context import RunContext

# On a copied loader: the user's loader.
_ORIGINAL = "_launcher_made_from"


@dataclass(frozen=True, slots=True)
class DataSplit:
    """How the training samples are split among the ranks.

    Attributes:
        seed: of the order.
        fixed_global_batch: whether the user fixed `global_batch_size`.
        distribute: `use_distributed_sampler`; if false, each rank reads all samples of its loaders.
    """

    batch: BatchSplit
    rank: int
    seed: int
    fixed_global_batch: bool = False
    distribute: bool = True

    @classmethod
    def of_run(cls, ctx: RunContext) -> DataSplit:
        """The split of a run."""
        distribute = ctx.config.trainer.use_distributed_sampler is not False
        is_fixed = ctx.config.global_batch_size is not None
        return cls(ctx.plan.batch, ctx.topology.rank, ctx.config.seed, is_fixed, distribute)


class DataOrder:
    """Puts training loaders into one global order that can be resumed at any batch.

    A loader keeps its class and all attributes but its sampler. A sampler or batch sampler of the user decides the
    order, and draws from generators that are seeded for each epoch. `on_batch` is called with the owner of a loader and
    its micro batch size if that is not the planned one.
    """

    def __init__(
        self,
        split: DataSplit,
        notice: Callable[[str], None],
        on_batch: Callable[[str, int], None] = lambda *_: None,
    ) -> None:
        self.batch = split.batch
        self._rank, self._fixed, self._distribute = split.rank, split.fixed_global_batch, split.distribute
        self._sharding = Sharding(*((split.batch.world_size, split.rank) if split.distribute else (1, 0)), split.seed)
        self._notice = notice
        self._notified: set[str] = set()
        self._on_batch = on_batch
        self._corrected: set[int] = set()

    def notify_once(self, text: str) -> None:
        """Give a notice unless it was given before."""
        if text not in self._notified:
            self._notified.add(text)
            self._notice(text)

    def apply(self, make: Callable[[], Any], owner: str, *, overfit: bool = False) -> Any:
        """Put the loaders of `make`, the `train_dataloader` of the owner, in order.

        With `overfit` every epoch has the same batches, in the dataset's own order.

        Raises:
            DataError: there is no data, or the batch is not the planned one.
        """
        try:
            loaders = make()
        except ValueError as error:
            # torch's RandomSampler raises this for an empty dataset.
            if "num_samples=0" in str(error):
                raise _empty_data_error(owner) from error
            raise
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
        has_several = len(combined.flattened) > 1
        converted = [self._convert(loader, owner, overfit, has_several) for loader in combined.flattened]
        if combined is loaders:
            # A copy: another run of this process may use the user's object again.
            combined = copy.copy(combined)
        combined.flattened = converted
        return combined if isinstance(loaders, CombinedLoader) else combined.iterables

    def _convert(self, loader: Any, owner: str, overfit: bool, has_several: bool) -> Any:
        loader = vars(loader).get(_ORIGINAL, loader) if isinstance(loader, DataLoader) else loader
        if not isinstance(loader, DataLoader):
            kind = type(loader).__name__
            if self._fixed:
                self.notify_once(f"cannot check global_batch_size: {owner} returned a {kind}, not a DataLoader")
            reason = kind if isinstance(loader, CombinedLoader) else f"{kind} is not a DataLoader"
            self._notify_unchanged(reason, loader)
            return loader
        self._check_size(loader, owner, has_several)
        reason = self._find_obstacle(loader, overfit)
        if reason is not None:
            keep_workers_at_ctrl_c(loader)
            self._notify_unchanged(reason, loader)
            return loader
        if type(loader).__iter__ not in (DataLoader.__iter__, StatefulDataLoader.__iter__):
            self.notify_once(f"{type(loader).__name__} overrides __iter__: a resume is exact only if it draws from its "
                             "sampler")  # fmt: skip
        return self._place(loader, overfit)

    def _place(self, loader: DataLoader[Any], overfit: bool) -> DataLoader[Any]:
        """A copy of the loader with a placeable sampler."""
        made = copy.copy(loader)
        # torch does not allow to set these attributes of a loader after its construction.
        values = vars(made)
        values[_ORIGINAL] = loader
        if _is_default(loader):
            sampler: PlaceableSampler = self._sampler(loader, overfit)
            if loader.batch_sampler is not None:
                values["batch_sampler"] = BatchSampler(sampler, cast(int, loader.batch_size), loader.drop_last)
        else:
            batches: Any = loader.batch_sampler
            order = None
            if _is_known(_sampler_of(batches)):
                sharding = replace(self._sharding_of(loader), seeds_samples=False)
                order = self._order_of(loader, sharding, isinstance(batches.sampler, RandomSampler))
            self._notify_user_order(batches)
            sampler = PlacedBatches(batches, self._sharding_of(loader), order)
            values["batch_sampler"] = sampler
        values["sampler"] = sampler
        values["generator"] = loader.generator or sampler.generator
        if loader.num_workers:
            values["worker_init_fn"] = functools.partial(start_worker, inner=loader.worker_init_fn, rank=self._rank)
        return made

    def _sharding_of(self, loader: DataLoader[Any]) -> Sharding:
        """Workers draw from generators that are seeded for each sample."""
        return replace(self._sharding, seeds_samples=loader.num_workers > 0, drop_last=loader.drop_last)

    def _sampler(self, loader: DataLoader[Any], overfit: bool) -> PlaceableSampler:
        own, sharding = loader.sampler, self._sharding_of(loader)
        if overfit or _is_known(own):
            return self._order_of(loader, sharding, type(own) is not SequentialSampler and not overfit)
        self._notify_user_order(own)
        if isinstance(own, DistributedSampler):
            # It distributes the samples itself.
            sharding = replace(sharding, world_size=1, rank=0)
        return PlacedSampler(own, sharding, loader.batch_size or 1)

    def _order_of(self, loader: DataLoader[Any], sharding: Sharding, shuffle: bool) -> GlobalOrderSampler:
        global_batch_size = self.batch.global_batch_size if self._fixed and self._distribute else None
        kind = GlobalOrderSampler if shuffle else SequentialOrder
        return kind(cast(Sized, loader.dataset), sharding, shuffle=shuffle, global_batch_size=global_batch_size)

    def _notify_user_order(self, sampler: Any) -> None:
        if type(sampler).__module__.partition(".")[0] != "torch":
            self.notify_once(f"{type(sampler).__name__} decides the order of the training data: a resume repeats it if "
                             "it depends only on set_epoch and the generators of Python, NumPy and torch")  # fmt: skip

    def _notify_unchanged(self, reason: str, loader: Any) -> None:
        effect = "restarts its epoch"
        if isinstance(loader, _Stateful):
            # Lightning saves the state of rank 0 after prefetching.
            effect = "gives all ranks the loader state of rank 0, which may be a batch ahead"
        ranks = self._sharding.world_size
        if ranks > 1 and find_undivided(loader) is not None:
            effect += f"; {describe_undivided(ranks)}"
        self.notify_once(f"the training loader is not changed ({reason}): a resume {effect}")

    def _notify_batch(self, owner: str, taken: int, has_several: bool) -> None:
        if has_several:
            planned = self.batch.micro_batch_size
            self.notify_once(f"{owner} returned a loader with batch_size {taken}; the plan has {planned} for each rank")
        elif taken not in self._corrected:
            # Loaders may be created again in every epoch.
            self._corrected.add(taken)
            self._on_batch(owner, taken)

    def _check_size(self, loader: DataLoader[Any], owner: str, has_several: bool) -> None:
        length = None if isinstance(loader.dataset, IterableDataset) else len(cast(Sized, loader.dataset))
        if length == 0:
            raise _empty_data_error(owner)
        planned, ranks = self.batch.global_batch_size, self.batch.world_size
        taken = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if not self._fixed:
            if planned is not None and taken is not None and taken != self.batch.micro_batch_size:
                self._notify_batch(owner, taken, has_several)
            return
        if taken != self.batch.micro_batch_size:
            raise DataError(
                f"global_batch_size {planned} needs batch_size {self.batch.micro_batch_size} on each of {ranks} ranks, "
                f"but {owner} returned a loader with {taken}; create it with self.batch_size or "
                "self.hparams.batch_size, from an argument `batch_size` of that class, or choose another "
                "global_batch_size or trainer.accumulate_grad_batches"
            )
        if length is not None and planned is not None and length < planned:
            raise DataError(
                f"the training data has {length} samples, fewer than one global_batch_size {planned}; "
                "give more data, or set a smaller global_batch_size"
            )

    def _find_obstacle(self, loader: DataLoader[Any], overfit: bool) -> str | None:
        """Why a loader cannot be placed; None if it can."""
        if isinstance(loader.dataset, IterableDataset):
            return "its dataset is iterable"
        drawn = loader.sampler if _is_default(loader) else loader.batch_sampler
        if sized_len(drawn) is None:
            return f"its {type(drawn).__name__} has no length"
        if _is_default(loader):
            return None
        if overfit or (self._sharding.world_size > 1 and not _is_known(_sampler_of(drawn))):
            return f"it has its own {type(drawn).__name__}"
        return None


def is_placeable(loader: Any) -> bool:
    """Whether the loader can start anywhere in an epoch."""
    return isinstance(loader, DataLoader) and isinstance(loader.sampler, PlaceableSampler)


def place_loaders(combined: CombinedLoader, epoch: int, batches: int) -> None:
    """Make the next iteration start after the batches that the combined loaders have returned in this epoch."""
    for loader in filter(is_placeable, combined.flattened):
        iteration, returned = 0, batches
        if combined._mode == "max_size_cycle":
            # A loader that has ended starts again only with the next batch, if there is one.
            iteration = max(batches - 1, 0) // max(len(loader), 1)
            returned = batches - iteration * len(loader)
        sampler = loader.sampler
        size = 1 if isinstance(sampler, PlacedBatches) else loader.batch_size or 1
        sampler.place(epoch, iteration, returned * size)


def _empty_data_error(owner: str) -> DataError:
    text = f"the training data is empty: {owner} returned a loader without samples; check the path of its data"
    return DataError(text)


def _is_default(loader: DataLoader[Any]) -> bool:
    """Whether torch created the batch sampler, from the loader's sampler and batch size."""
    return loader.batch_sampler is None or loader.batch_size is not None


def _sampler_of(batches: Any) -> Any:
    """The sampler of a batch sampler if it can be replaced, which a property of its class cannot."""
    return getattr(batches, "__dict__", {}).get("sampler")


def _is_known(sampler: Any) -> bool:
    """Whether it returns each sample once, in order or shuffled."""
    if type(sampler) in (RandomSampler, StatefulRandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler
