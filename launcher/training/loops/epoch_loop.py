"""The batches of an epoch, which starts at a `Position`, their ends, and the validations within the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader
from typing_extensions import override

from launcher.training.loops.moment import MomentObserver, StepMoment

if TYPE_CHECKING:
    from launcher.training.loops.position import Position, Stage

# Marks a loader whose generator was set here, not by the user.
_OWN_GENERATOR = "_launcher_generator"


def set_restarting(loop: _Loop, restarting: bool) -> None:
    """Set Lightning's flag on the loop and on those inside it, even if the loop overrides the property."""
    cast(Any, _Loop.restarting).fset(loop, restarting)


class ValidationLoop(_EvaluationLoop):
    """Validations whose loaders draw nothing from the training's random generators when an iteration starts.

    So the training does not change if a resume adds or skips a validation.
    """

    has_begun = False

    @override
    def reset(self) -> None:
        observer: MomentObserver | None = cast(Any, self.trainer.fit_loop).observer
        self.has_begun = True
        if observer is not None:
            observer.leave()
        for loader in cast(CombinedLoader, self._combined_loader).flattened:
            if isinstance(loader, DataLoader):
                if loader.generator is None:
                    loader.generator = torch.Generator()
                    vars(loader)[_OWN_GENERATOR] = True
                if _OWN_GENERATOR in vars(loader):
                    loader.generator.manual_seed(self.trainer.global_step)
        super().reset()


class EpochLoop(_TrainingEpochLoop):
    """The batches of an epoch; the first one follows the position that the fit loop was resumed at."""

    def __init__(self, trainer: pl.Trainer, **limits: Any) -> None:
        super().__init__(trainer, **limits)
        self.val_loop = ValidationLoop(
            trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False
        )
        self._is_ending_batch = False
        self._position: Position | None = None
        self._validated_batches = 0
        self._validates_to_stop = False

    @property
    def ends_early(self) -> bool:
        """Whether the epoch ends with this batch although it has more, according to the current state."""
        trainer = self.trainer
        should_stop = trainer.should_stop and trainer.fit_loop._can_stop_early
        return should_stop or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)

    @property
    def validated_to_stop(self) -> bool:
        """See `Position.validated_to_stop`."""
        return self._validates_to_stop and self.stage != "batch_end" and not self.val_loop.skip

    @property
    def stage(self) -> Stage:
        """See `Position.stage`."""
        counts: Any = self.batch_progress.current
        if counts.processed > counts.completed:
            return "batch_end"
        if not self._is_ending_batch:
            return "between"
        # The next validation resets these counters.
        val = self.val_loop.batch_progress
        has_run = self.val_loop._has_run and val.is_last_batch and val.current.completed == val.current.ready
        return "validated" if self.trainer.validating and has_run else "batch_end"

    @override
    def reset(self) -> None:
        position: Position | None = cast(Any, self.trainer.fit_loop).take_position()
        self._position = position
        self._is_ending_batch = self._validates_to_stop = False
        self._validated_batches = 0 if position is None else position.validated_batches
        set_restarting(self, False)
        if position is None:
            return super().reset()
        optimizer, manual = self.automatic_optimization.optim_progress.optimizer, self.manual_optimization
        for progress in (optimizer.step, optimizer.zero_grad, manual.optim_step_progress, self.scheduler_progress):
            # A step that was interrupted is done again.
            for counts in (progress.total, progress.current):
                counts.reset_on_restart()
        if position.accumulate != position.planned_accumulate:
            # A callback set it at the start of the epoch.
            self.trainer.accumulate_grad_batches = position.accumulate
        has_reached_end = position.batches >= self.trainer.num_training_batches
        self.batch_progress.is_last_batch = position.last or has_reached_end
        return None

    @override
    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        position, self._position = self._position, None
        if position is not None and position.stage in ("batch_end", "validated"):
            self._skip_next_val = position.stage == "validated"
            self.on_advance_end(data_fetcher)

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        super().advance(data_fetcher)
        self._is_ending_batch = True
        if self._observer is not None:
            self._observer.reach(StepMoment.BATCH)

    @property
    def _observer(self) -> MomentObserver | None:
        return cast(Any, self.trainer.fit_loop).observer

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        self._is_ending_batch = True
        if self.batch_progress.current.ready <= self._validated_batches:
            self._skip_next_val = True
        self._validates_to_stop = not self._skip_next_val and self._validates_only_to_stop(data_fetcher)
        self.val_loop.has_begun = False
        super().on_advance_end(data_fetcher)
        self._is_ending_batch = False
        if self._observer is not None:
            self._observer.reach(StepMoment.VALIDATED, has_validated=self.val_loop.has_begun)

    def _validates_only_to_stop(self, data_fetcher: _DataFetcher) -> bool:
        """Whether a validation follows this batch only because the Trainer should stop."""
        trainer = self.trainer
        if not (trainer.should_stop and self._should_check_val_fx(data_fetcher)):
            return False
        trainer.should_stop = False
        try:
            return not self._should_check_val_fx(data_fetcher)
        finally:
            trainer.should_stop = True


def after_batch(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Run `action` once at the end of this batch, before a validation that follows it.

    Call it in a callback's `on_train_batch_end`. A checkpoint that is saved in that hook lacks the changes that later
    callbacks and the module make in it, and a resume does not run the hook again. In `action` Lightning's counters have
    the same values as in the hook, so a resume continues at the end of the batch. Of several actions the last one runs
    first. An exception in `action` ends the training.
    """
    loop = trainer.fit_loop.epoch_loop
    proceed = loop.on_advance_end

    def once(data_fetcher: Any) -> None:
        if original is None:
            del vars(loop)["on_advance_end"]
        else:
            vars(loop)["on_advance_end"] = original
        with _batch_not_completed(loop.batch_progress):
            action()
        proceed(data_fetcher)

    original = vars(loop).get("on_advance_end")
    vars(loop)["on_advance_end"] = once


@contextmanager
def _batch_not_completed(progress: Any) -> Iterator[None]:
    for count in (progress.total, progress.current):
        count.completed -= 1
    try:
        yield
    finally:
        for count in (progress.total, progress.current):
            count.completed += 1
