"""Lightning's training loops, which go on from one `Position` instead of from the states of several parts.

Lightning's own restart has three ideas of where an epoch was: the loops' counters, the states of the loaders, and the
sampler's epoch. They differ after an epoch that the Trainer ended, and where validations fall on a checkpoint. Here the
counters are set to the position, the loaders are placed at it, and what was still to be done after its last batch is
done by the code that does it in an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader
from typing_extensions import override

from launcher.training.data.evaluation import SharedSource
from launcher.training.data.order import DataOrder, is_placeable, place
from launcher.training.loops.position import KEY, Position, changes_of, moved, read_position, rewound

# Marks a loader whose generator is not the user's.
_OURS = "_launcher_generator"


def use_resumable_loops(trainer: pl.Trainer, order: DataOrder) -> None:
    """Replace the Trainer's training loops before its first `fit`.

    Args:
        trainer: whose limits the new loops take over.
        order: gives the training data its order, and is told what a resume cannot repeat.
    """
    before = trainer.fit_loop
    loop = FitLoop(trainer, order, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
    loop.epoch_loop = EpochLoop(trainer, min_steps=before.min_steps, max_steps=before.max_steps)
    trainer.fit_loop = loop
    evaluations = {"val": (loop.epoch_loop.val_loop, trainer.validate_loop), "test": (trainer.test_loop,)}
    for name, loops in evaluations.items():
        for each in loops:
            each._data_source = SharedSource(f"{name}_dataloader", trainer)


def _set_restarting(loop: _Loop, restarting: bool) -> None:
    """Of the loop and those in it."""
    cast(Any, _Loop.restarting).fset(loop, restarting)


class _OrderedSource(_DataLoaderSource):
    """Where the training loaders come from, put into their order."""

    def __init__(self, order: DataOrder, trainer: pl.Trainer) -> None:
        super().__init__(None, "train_dataloader")
        self._order = order
        self._trainer = trainer

    @override
    def dataloader(self) -> Any:
        owner = f"{type(self.instance).__name__}.train_dataloader" if self.is_module() else "fit"
        return self._order.apply(super().dataloader, owner, overfit=getattr(self._trainer, "overfit_batches", 0) > 0)


class FitLoop(_FitLoop):
    """Epochs; saves and restores the position.

    Attributes:
        resumed_from: the position in the checkpoint, until the training begins.

    Args:
        trainer: that runs it.
        order: gives the training data its order, and is told what a resume cannot repeat.
        limits: `min_epochs` and `max_epochs`.
    """

    def __init__(self, trainer: pl.Trainer, order: DataOrder, **limits: Any) -> None:
        super().__init__(trainer, **limits)
        self._data_source = _OrderedSource(order, trainer)
        self._order = order
        self.resumed_from: Position | None = None
        self._position: Position | None = None
        self._saved: Position | None = None
        # Of loaders that save a state of their own, by their number.
        self._loader_states: Mapping[str, Any] = {}
        # In which epochs the loaders were made last, of a checkpoint.
        self._made: Mapping[str, Any] = {}

    @property
    @override
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        # Lightning's says yes wherever max_steps is given.
        _set_restarting(self, restarting)

    @property
    def position(self) -> Position | None:
        """What the next epoch begins with; None for its beginning."""
        return self._position if self._position is not None and self._position.in_epoch else None

    @property
    @override
    def done(self) -> bool:
        # Its last step may be the training's last, and its validation is still to be made up for.
        due = self._position is not None and self._position.stage == "batch_end"
        return super().done and not (due and self.max_batches != 0)

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        state: dict[str, Any] = super().on_save_checkpoint()
        state.pop("combined_loader", None)
        if self._combined_loader is not None:
            states = {str(n): loader.state_dict() for n, loader in enumerate(self._combined_loader.flattened)
                      if isinstance(loader, _Stateful) and not is_placeable(loader)}  # fmt: skip
            if states:
                state["loader_states"] = states
        state[KEY] = self._now().to_dict()
        state["loaders_made"] = {"train": self._last_train_dl_reload_epoch,
                                 "val": self.epoch_loop.val_loop._last_val_dl_reload_epoch}  # fmt: skip
        return state

    def _now(self) -> Position:
        loop = cast(EpochLoop, self.epoch_loop)
        batches: Any = loop.batch_progress
        last = batches.is_last_batch or batches.current.ready == self.trainer.num_training_batches
        epochs = self.epoch_progress.current
        loaders = [] if self._combined_loader is None else self._combined_loader.flattened
        return read_position(
            vars(epochs),
            vars(batches.current),
            # Processed is completed, but for the batch that is being saved in.
            batches.total.completed + batches.current.processed - batches.current.completed,
            last=last,
            stage=loop.stage,
            cut=loop.ends_early and not last,
            validated_to_stop=loop.validated_to_stop,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer.lightning_module.automatic_optimization
            else 1,
            planned_accumulate=self._order.batch.accumulate,
            world_size=self._order.batch.world_size,
            batch_sizes=tuple(getattr(loader, "batch_size", None) for loader in loaders),
        )  # fmt: skip

    @override
    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        super().load_state_dict(state_dict, prefix)
        own: Mapping[str, Any] = state_dict.get(f"{prefix}state_dict", {})
        counts: Any = self.epoch_loop.batch_progress
        saved = Position.from_dict(own[KEY]) if KEY in own else read_position(
            vars(self.epoch_progress.current), vars(counts.current),
            counts.total.completed + counts.current.processed - counts.current.completed,
            last=counts.is_last_batch, stage=None,
        )  # fmt: skip
        self._loader_states = own.get("loader_states", {})
        self._made = own.get("loaders_made", {})
        self.resumed_from = saved
        self._saved, self._position = saved, rewound(saved)
        self._set_counters(self._position)
        self.restarting = self._position.in_epoch
        if self._combined_loader is not None and self._data_fetcher is not None:
            # `configure_optimizers` made the loaders to count their batches.
            self._load_combined_loader_states()
            iter(self._data_fetcher)

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
        """Place the loaders, whose iterators Lightning makes next."""
        combined = cast(CombinedLoader, self._combined_loader)
        if self._saved is not None:
            sizes = [getattr(loader, "batch_size", None) for loader in combined.flattened]
            batch = self._order.batch
            now = moved(self._position or rewound(self._saved), batch.world_size, batch.accumulate, sizes)
            for text in changes_of(self._saved, now):
                self._order.tell(text)
            self._position = now if now.in_epoch else None
            self.restarting = now.in_epoch
            self._set_counters(now)
            self._saved = None
        position = self._position
        place(combined, self._epoch, 0 if position is None else position.batches)
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
        made, self._made, self.resumed_from = self._made, {}, None
        if made:
            # `reload_dataloaders_every_n_epochs` makes them anew in the epochs in which it does without a break.
            self._last_train_dl_reload_epoch = made["train"]
            self.epoch_loop.val_loop._last_val_dl_reload_epoch = made["val"]

    @override
    def on_advance_start(self) -> None:
        super().on_advance_start()
        if isinstance(self._data_fetcher, _DataLoaderIterDataFetcher):
            self._order.tell("training_step takes dataloader_iter: batches that it fetched ahead are lost in a resume")
        # The first iterator of a run was made with the loaders, where they were placed.
        if self.trainer.current_epoch > 0 and not self.is_resuming and not self.restarting:
            place(cast(CombinedLoader, self._combined_loader), self._epoch, 0)

    @property
    def _epoch(self) -> int:
        return cast(Any, self.epoch_progress.current).processed

    def take_position(self) -> Position | None:
        """The position that the epoch goes on from, once; None at an epoch's beginning."""
        position, self._position = self.position, None
        return position


class ValidationLoop(_EvaluationLoop):
    """Validations that draw nothing from the training's generators when they begin their loaders.

    One more or less, as where a run is told to stop, leaves the training as it is.
    """

    @override
    def reset(self) -> None:
        for loader in cast(CombinedLoader, self._combined_loader).flattened:
            if isinstance(loader, DataLoader):
                if loader.generator is None:
                    loader.generator = torch.Generator()
                    vars(loader)[_OURS] = True
                if _OURS in vars(loader):
                    loader.generator.manual_seed(self.trainer.global_step)
        super().reset()


class EpochLoop(_TrainingEpochLoop):
    """Batches of an epoch; begins at the position.

    Attributes:
        stage: what follows the last trained batch, see `Position`.
    """

    def __init__(self, trainer: pl.Trainer, **limits: Any) -> None:
        super().__init__(trainer, **limits)
        self.val_loop = ValidationLoop(
            trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False
        )
        self._ending_batch = False
        self._position: Position | None = None
        self._validated_batches = 0
        self._stops = False

    @property
    def ends_early(self) -> bool:
        """Whether the epoch ends with this batch, though it has more, as far as is known."""
        trainer = self.trainer
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        return stops or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)

    @property
    def validated_to_stop(self) -> bool:
        """See `Position`."""
        return self._stops and self.stage != "batch_end" and not self.val_loop.skip

    @property
    def stage(self) -> Any:
        """See the class."""
        counts: Any = self.batch_progress.current
        if counts.processed > counts.completed:
            return "batch_end"
        if not self._ending_batch:
            return "between"
        # Its counters are begun anew only by the next validation.
        val = self.val_loop.batch_progress
        ran = self.val_loop._has_run and val.is_last_batch and val.current.completed == val.current.ready
        return "validated" if self.trainer.validating and ran else "batch_end"

    @override
    def reset(self) -> None:
        fit_loop = self.trainer.fit_loop
        position = fit_loop.take_position() if isinstance(fit_loop, FitLoop) else None
        self._position = position
        self._ending_batch = self._stops = False
        self._validated_batches = 0 if position is None else position.validated_batches
        _set_restarting(self, False)
        if position is None:
            return super().reset()
        optimizer, manual = self.automatic_optimization.optim_progress.optimizer, self.manual_optimization
        for progress in (optimizer.step, optimizer.zero_grad, manual.optim_step_progress, self.scheduler_progress):
            # A step in which the run broke off is taken again.
            for counts in (progress.total, progress.current):
                counts.reset_on_restart()
        if position.accumulate != position.planned_accumulate:
            # A callback chose it when the epoch began.
            self.trainer.accumulate_grad_batches = position.accumulate
        reached = position.batches >= self.trainer.num_training_batches
        self.batch_progress.is_last_batch = position.last or reached
        return None

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        position, self._position = self._position, None
        if position is not None and position.stage in ("batch_end", "validated"):
            self._skip_next_val = position.stage == "validated"
            self.on_advance_end(data_fetcher)

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        self._ending_batch = True
        if self.batch_progress.current.ready <= self._validated_batches:
            self._skip_next_val = True
        self._stops = not self._skip_next_val and self._validates_to_stop(data_fetcher)
        super().on_advance_end(data_fetcher)
        self._ending_batch = False

    def _validates_to_stop(self, data_fetcher: _DataFetcher) -> bool:
        trainer = self.trainer
        if not (trainer.should_stop and self._should_check_val_fx(data_fetcher)):
            return False
        trainer.should_stop = False
        try:
            return not self._should_check_val_fx(data_fetcher)
        finally:
            trainer.should_stop = True
