"""Lightning's training loops, which resume from one `Position` instead of from the states of several parts.

Lightning derives the place in an epoch from the loops' counters, the loaders' states and the sampler's epoch, which
disagree after an epoch that the Trainer ended early, and if a validation and a checkpoint follow the same batch. Here
counters and loaders are set to the position, and the code of an uninterrupted run finishes the position's last batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from typing_extensions import override

from launcher.training.data.evaluation import SharedSource
from launcher.training.data.order import DataOrder, is_placeable, place_loaders
from launcher.training.loops.epoch_loop import EpochLoop, set_restarting
from launcher.training.loops.moment import MomentObserver, StepMoment
from launcher.training.loops.position import (
    KEY,
    Position,
    describe_change,
    read_position,
    rewind_position,
    scale_position,
)


def use_resumable_loops(trainer: pl.Trainer, order: DataOrder) -> None:
    """Replace the Trainer's training loops before its first `fit`; the new ones have the same limits."""
    before = trainer.fit_loop
    loop = FitLoop(trainer, order, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
    loop.epoch_loop = EpochLoop(trainer, min_steps=before.min_steps, max_steps=before.max_steps)
    trainer.fit_loop = loop
    evaluations = (("val", loop.epoch_loop.val_loop), ("val", trainer.validate_loop), ("test", trainer.test_loop))
    for name, each in evaluations:
        each._data_source = SharedSource(f"{name}_dataloader", trainer)


class _OrderedSource(_DataLoaderSource):
    """The source of the training loaders, which puts them in order."""

    def __init__(self, order: DataOrder, trainer: pl.Trainer) -> None:
        super().__init__(None, "train_dataloader")
        self._order = order
        self._trainer = trainer

    @override
    def dataloader(self) -> Any:
        owner = f"{type(self.instance).__name__}.train_dataloader" if self.is_module() else "fit"
        return self._order.apply(super().dataloader, owner, overfit=getattr(self._trainer, "overfit_batches", 0) > 0)


class FitLoop(_FitLoop):
    """The epochs; saves and restores the position. `order` also gives notices of data that a resume cannot repeat."""

    def __init__(self, trainer: pl.Trainer, order: DataOrder, **limits: Any) -> None:
        super().__init__(trainer, **limits)
        self._data_source = _OrderedSource(order, trainer)
        self._order = order
        # The position in the checkpoint, until the training starts.
        self.resumed_from: Position | None = None
        self._position: Position | None = None
        self._saved: Position | None = None
        # States of stateful loaders, by the index of the loader.
        self._loader_states: Mapping[str, Any] = {}
        # The epochs in which the loaders of the checkpointed run were created last.
        self._reload_epochs: Mapping[str, Any] = {}
        self.observer: MomentObserver | None = None
        # The user's `max_epochs`, if the checkpoint has more epochs.
        self.lowered_max_epochs: int | None = None

    @property
    @override
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        # Lightning's setter always sets True if max_steps is given.
        set_restarting(self, restarting)

    @property
    def position(self) -> Position | None:
        """Where the next epoch starts; None for its first batch."""
        return self._position if self._position is not None and self._position.in_epoch else None

    @property
    @override
    def done(self) -> bool:
        # The validation of the training's last step may be due.
        is_due = self._position is not None and self._position.stage == "batch_end"
        return super().done and not (is_due and self.max_batches != 0)

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = super().on_save_checkpoint()
        state.pop("combined_loader", None)
        if self._combined_loader is not None:
            states = {str(n): loader.state_dict() for n, loader in enumerate(self._combined_loader.flattened)
                      if isinstance(loader, _Stateful) and not is_placeable(loader)}  # fmt: skip
            if states:
                state["loader_states"] = states
        state[KEY] = self.current_position().to_dict()
        state["loaders_made"] = {"train": self._last_train_dl_reload_epoch,
                                 "val": self.epoch_loop.val_loop._last_val_dl_reload_epoch}  # fmt: skip
        return state

    def current_position(self) -> Position:
        """Where a training that is interrupted now continues."""
        loop = cast(EpochLoop, self.epoch_loop)
        batches: Any = loop.batch_progress
        is_last = batches.is_last_batch or batches.current.ready == self.trainer.num_training_batches
        is_automatic = self.trainer.lightning_module.automatic_optimization
        loaders = [] if self._combined_loader is None else self._combined_loader.flattened
        return read_position(
            vars(self.epoch_progress.current),
            vars(batches.current),
            _trained_batches(batches),
            last=is_last,
            stage=loop.stage,
            cut=loop.ends_early and not is_last,
            validated_to_stop=loop.validated_to_stop,
            accumulate=self.trainer.accumulate_grad_batches if is_automatic else 1,
            planned_accumulate=self._order.batch.accumulate,
            world_size=self._order.batch.world_size,
            batch_sizes=tuple(getattr(loader, "batch_size", None) for loader in loaders),
        )

    @override
    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        super().load_state_dict(state_dict, prefix)
        own: Mapping[str, Any] = state_dict.get(f"{prefix}state_dict", {})
        batches: Any = self.epoch_loop.batch_progress
        saved = Position.from_dict(own[KEY]) if KEY in own else read_position(
            vars(self.epoch_progress.current), vars(batches.current), _trained_batches(batches),
            last=batches.is_last_batch, stage=None,
        )  # fmt: skip
        self._loader_states = own.get("loader_states", {})
        self._reload_epochs = own.get("loaders_made", {})
        self.resumed_from = saved
        self._saved, self._position = saved, rewind_position(saved)
        self._set_counters(self._position)
        self.restarting = self._position.in_epoch
        self._accept_lower_limit()
        if self._combined_loader is not None and self._data_fetcher is not None:
            # `configure_optimizers` has created the loaders already, to count their batches.
            self._load_combined_loader_states()
            iter(self._data_fetcher)

    def _accept_lower_limit(self) -> None:
        """A run that has more epochs than requested is complete; Lightning's restore would raise an error."""
        if self.max_epochs not in (None, -1) and self.trainer.current_epoch > self.max_epochs:
            self.lowered_max_epochs, self.max_epochs = self.max_epochs, self.trainer.current_epoch

    def _set_counters(self, position: Position) -> None:
        begun = position.epoch + (position.in_epoch or position.stage == "epoch_end")
        processed = position.epoch + (position.stage == "epoch_end")
        for counts in (self.epoch_progress.total, self.epoch_progress.current):
            counts.load_state_dict({"ready": begun, "started": begun, "processed": processed,
                                    "completed": position.epoch})  # fmt: skip
        batches = position.batches if position.in_epoch else 0
        for counts, number in (
            (self.epoch_loop.batch_progress.total, position.total),
            (self.epoch_loop.batch_progress.current, batches),
        ):
            counts.load_state_dict(dict.fromkeys(("ready", "started", "processed", "completed"), number))
        self.epoch_loop.batch_progress.is_last_batch = position.last
        self.epoch_loop.val_loop.batch_progress.reset()

    @override
    def _load_combined_loader_states(self) -> None:
        """Place the loaders; Lightning creates their iterators next."""
        combined = cast(CombinedLoader, self._combined_loader)
        if self._saved is not None:
            sizes = [getattr(loader, "batch_size", None) for loader in combined.flattened]
            batch = self._order.batch
            position = self._position or rewind_position(self._saved)
            now = scale_position(position, batch.world_size, batch.accumulate, sizes)
            if (text := describe_change(self._saved, now)) is not None:
                self._order.notify_once(text)
            self._position = now if now.in_epoch else None
            self.restarting = now.in_epoch
            self._set_counters(now)
            self._saved = None
        position = self._position
        place_loaders(combined, self._epoch, 0 if position is None else position.batches)
        states, self._loader_states = self._loader_states, {}
        if position is None or position.last:
            return
        for number, state in states.items():
            loader = combined.flattened[int(number)] if int(number) < len(combined.flattened) else None
            if isinstance(loader, _Stateful) and not is_placeable(loader):
                loader.load_state_dict(state)

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        epochs, self._reload_epochs, self.resumed_from = self._reload_epochs, {}, None
        if epochs:
            # With these, `reload_dataloaders_every_n_epochs` reloads in the same epochs as an uninterrupted run.
            self._last_train_dl_reload_epoch = epochs["train"]
            self.epoch_loop.val_loop._last_val_dl_reload_epoch = epochs["val"]

    @override
    def on_advance_start(self) -> None:
        super().on_advance_start()
        if isinstance(self._data_fetcher, _DataLoaderIterDataFetcher):
            self._order.notify_once("training_step takes dataloader_iter: a resume loses prefetched batches")
        # The first iterator of a run was created and placed together with the loaders.
        if self.trainer.current_epoch > 0 and not self.is_resuming and not self.restarting:
            place_loaders(cast(CombinedLoader, self._combined_loader), self._epoch, 0)

    @override
    def on_advance_end(self) -> None:
        if self.observer is not None:
            self.observer.leave()
        super().on_advance_end()
        if self.observer is not None:
            self.observer.reach(StepMoment.EPOCH)

    @property
    def _epoch(self) -> int:
        return cast(Any, self.epoch_progress.current).processed

    def take_position(self) -> Position | None:
        """Return once the position that the epoch continues from; None at an epoch's start."""
        position, self._position = self.position, None
        return position


def _trained_batches(progress: Any) -> int:
    """Batches trained in all epochs; while a batch's end saves a checkpoint, it is processed, but not completed."""
    return progress.total.completed + progress.current.processed - progress.current.completed
