"""Keeps at each step what a rank has alone, and saves the complete state of the last step after a failure.

Under DDP every rank has the model and the optimizer's state, which change only in the optimizer's step. So a survivor
has those of the last step, and the records of all ranks have the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from launcher.process.rank_status import RankStatusWriter, has_lost_peer
from launcher.runs.kept_state import record_path, remove_kept_states
from launcher.training.loops.fit_loop import FitLoop
from launcher.training.loops.moment import StepMoment
from launcher.training.loops.position import Position
from launcher.training.resume.epoch_metrics import EpochMetrics
from launcher.training.survivors.callback_states import CallbackStates
from launcher.training.survivors.own_state import OwnState
from launcher.training.survivors.record import RecordWriter
from launcher.training.survivors.saving import KeptFolders, add_own_record, save_state

# In the first steps all parameters are checked for changes outside of the optimizer, later this many.
_FIRST_STEPS, _WATCHED = 5, 16


class StepKeeper(pl.Callback):
    """Writes the rank's record at each step; after a failure, saves the state of the last step for the next attempt.

    Args:
        metrics: has the values accumulated in the epoch.
        status: informs the agent that the state is being saved.
        silent: callbacks whose `on_save_checkpoint` does not belong to a save that no one has asked for.
        keeps: whether another attempt may follow; otherwise only the state of the one before is used and removed.
    """

    def __init__(
        self,
        folders: KeptFolders,
        metrics: EpochMetrics,
        status: RankStatusWriter,
        silent: tuple[type[pl.Callback], ...],
        *,
        keeps: bool = True,
    ) -> None:
        self._folders = folders
        self._metrics = metrics
        self._status = status
        self._silent = silent
        self._keeps = keeps
        self._writer: RecordWriter | None = None
        self._own: OwnState | None = None
        self._callbacks = CallbackStates()
        # All parameters are watched in the first steps, and some of them later.
        self._parameters: list[Any] = []
        self._watched: list[Any] = []
        # The rest is as of the last moment.
        self._position: Position | None = None
        self._versions: list[int] = []
        self._norms: list[Tensor] = []
        # Parameters change between the sum of the gradients and the end of the batch.
        self._is_stepping = False
        self._steps = 0
        self._trainer: Any = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop: Any = trainer.fit_loop
        self._trainer = trainer
        if isinstance(loop, FitLoop) and self._keeps:
            self._parameters = self._watched = list(pl_module.parameters())
            self._own = OwnState(trainer, self._metrics)
            self._callbacks.watch(trainer)
            self._writer = RecordWriter(record_path(self._folders.records, trainer.global_rank))
            loop.observer = self

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Before the callbacks that read these values.
        add_own_record(checkpoint, record_path(self._folders.records, trainer.global_rank), trainer.global_rank)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # The others can finish the step if this rank ends any time later.
        if self._writer is not None and not self._trainer.fit_loop.epoch_loop._should_accumulate():
            with self._stops_at_errors():
                # With manual optimization another optimizer may have stepped before this backward pass.
                is_checked = 0 < self._steps < _FIRST_STEPS and not self._is_stepping
                if is_checked and (reason := self._find_change()) is not None:
                    self._stop(reason)
                self._write(self._batches + 1, StepMoment.FORWARD)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._keeps and self._steps < 2:
            self._steps += 1
            if self._steps == 2:
                self._remove_states()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._is_stepping = True

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # A rank with an error of its own is no survivor, and that error decides whether an attempt follows.
        if not has_lost_peer(exception) or self._position is None or self._writer is None:
            return
        # The agent waits for the end of this.
        self._status.update(keeping=True)
        self._status.record_error(exception)
        try:
            problem = self._find_problem()
            if problem is None:
                problem = save_state(trainer, self._folders, self._position, self._callbacks, self._silent)
        except Exception as error:  # noqa: BLE001 -- hooks of the user; the failure that ends the attempt matters more
            problem = f"{type(error).__name__}: {error}"
        self._status.update(keeping=False, not_kept=problem)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            self._remove_states()

    def reach(self, moment: StepMoment, *, has_validated: bool = False) -> None:
        """Record the state at a moment; of a batch that is followed by no validation, only the position changes."""
        with self._stops_at_errors():
            self._reach(moment, has_validated)

    def leave(self) -> None:
        """Copy what the hooks of a validation or of the epoch's end may change."""
        with self._stops_at_errors():
            is_within_step = self._trainer.fit_loop.epoch_loop._should_accumulate()
            self._callbacks.keep(self._trainer, is_step=False, is_within_step=is_within_step)
            self._norms = self._read_norms()

    def _reach(self, moment: StepMoment, has_validated: bool) -> None:
        loop = self._trainer.fit_loop
        if moment is not StepMoment.EPOCH and loop.epoch_loop._should_accumulate():
            return
        if moment is StepMoment.VALIDATED and not has_validated:
            if self._position is not None:
                self._position = dataclasses.replace(self._position, stage="between")
            return
        self._position = loop.current_position()
        self._is_stepping = False
        self._versions = [parameter._version for parameter in self._watched]
        self._callbacks.keep(self._trainer, is_step=moment is not StepMoment.EPOCH)
        self._norms = []
        if moment is StepMoment.EPOCH and self._own is not None:
            self._norms = self._read_norms()
            self._own.find_buffers()
        if self._callbacks.problem is not None:
            self._stop(self._callbacks.problem)
        self._write(self._batches, moment)
        if moment is StepMoment.BATCH:
            self._steps += 1
            if self._steps == _FIRST_STEPS:
                self._watched = self._parameters[:: len(self._parameters) // _WATCHED + 1]
                self._versions = [parameter._version for parameter in self._watched]
            if self._steps == 2:
                # Every rank has passed the step that the last attempt continued from.
                self._remove_states()

    @contextlib.contextmanager
    def _stops_at_errors(self) -> Iterator[None]:
        """Keep no step from an error on, as of a full disk or of a callback's `state_dict`; the training continues."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- the user's code raises anything
            self._stop(f"{type(error).__name__}: {error}")

    def _stop(self, reason: str) -> None:
        self._writer = self._trainer.fit_loop.observer = None
        self._status.update(not_kept=reason)

    @property
    def _batches(self) -> int:
        """Batches that this rank has trained in all epochs."""
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.completed + progress.current.processed - progress.current.completed

    def _write(self, batches: int, moment: StepMoment) -> None:
        if self._writer is not None and self._own is not None:
            self._writer.write(batches, moment, self._own.read())

    def _read_norms(self) -> list[Tensor]:
        """A callback may swap the parameters for a validation, through `.data`, which torch does not count."""
        with torch.no_grad():
            floats = [each for each in self._parameters if each.is_floating_point()]
            return list(torch._foreach_norm(floats)) if floats else []

    def _find_problem(self) -> str | None:
        if self._is_stepping:
            return "the end of its step was not done"
        if (reason := self._find_change()) is not None:
            return reason
        if self._norms and not all(map(torch.equal, self._norms, self._read_norms())):
            return "a hook has replaced its parameters"
        return None

    def _find_change(self) -> str | None:
        if self._versions == [parameter._version for parameter in self._watched]:
            return None
        return "its parameters change between two optimizer steps"

    def _remove_states(self) -> None:
        if self._trainer.local_rank == 0:
            remove_kept_states(self._folders.records)
        if self._trainer.global_rank == 0:
            remove_kept_states(self._folders.on_disk)
