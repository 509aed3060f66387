"""The run's own checkpoints, in addition to any that the user saves."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from typing_extensions import override

from launcher.checkpoint.background import BackgroundWriter
from launcher.checkpoint.precision import RECORD, make_record
from launcher.config.schema import CheckpointOptions
from launcher.core.errors import ConfigError, Problem
from launcher.core.wrapping import escape_controls
from launcher.planning.plan import Plan
from launcher.training.callbacks.pending_writes import publish_again_explained, reads_files
from launcher.training.callbacks.save_schedule import SaveSchedule
from launcher.training.loops.epoch_loop import after_batch
from strategies.batch import BatchSplit


class CheckpointAfterBatch(ModelCheckpoint):
    """A ModelCheckpoint that saves every n steps after all of the batch's hooks have run."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        save = super().on_train_batch_end
        after_batch(trainer, lambda: save(trainer, pl_module, outputs, batch, batch_idx))


class RunCheckpoint(CheckpointAfterBatch):
    """Saves the checkpoints that a run resumes from, independent of the user's checkpoint callbacks.

    Its own type keeps it if the model's `configure_callbacks` returns a ModelCheckpoint, and lets it have the same
    settings as another one.
    """

    def __init__(
        self,
        options: CheckpointOptions,
        folder: Path,
        background: BackgroundWriter | None = None,
        schedule: SaveSchedule | None = None,
    ) -> None:
        """Make the callback.

        `background` writes the checkpoints beside the training; None writes them while it waits. `schedule` decides
        when, for `every: auto`.
        """
        self._background, self._schedule = background, schedule
        self._paths = {"best": "", "last": ""}
        # The checkpoint that was just saved by this trigger, whose content the last checkpoint shares.
        self._fresh: str | None = None
        self._began: float | None = None
        super().__init__(
            dirpath=folder,
            filename="{epoch}-{step}",
            monitor=options.monitor,
            mode=options.mode,
            save_top_k=options.save_top_k,
            save_last=True,
            every_n_train_steps=options.every_n_steps if schedule is None else 1,
            every_n_epochs=options.every_n_epochs,
            # One `last.ckpt` that is overwritten: a resume reads that file.
            enable_version_counter=False,
        )

    @property
    @override
    def _legacy_state_key(self) -> Any:
        # Earlier versions used Lightning's ModelCheckpoint.
        return self.state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Move behind the model's own checkpoint callbacks: `trainer.checkpoint_callback` is the first one. The list is
        # replaced, not changed, as Lightning is iterating over it.
        connected: Any = trainer
        connected.callbacks = [*(each for each in connected.callbacks if each is not self), self]

    # Plain attributes of Lightning's class, so type checkers want no setters of properties.
    @property
    def best_model_path(self) -> str:
        """As Lightning's; who reads it finds the file."""
        return self._complete("best")

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._paths["best"] = path

    @property
    def last_model_path(self) -> str:
        """As Lightning's; who reads it finds the file."""
        return self._complete("last")

    @last_model_path.setter
    def last_model_path(self, path: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._paths["last"] = path

    def _complete(self, name: str) -> str:
        if self._background is not None and not self._background.accepts:
            self._background.wait()
        return self._paths[name]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._background is not None:
            self._background.check()
        if self._schedule is None or self._schedule.is_due(trainer.global_step):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._background is not None:
            self._background.wait()

    @override
    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        self._began = time.monotonic()
        has_validated: Any = trainer.fit_loop.epoch_loop.val_loop._has_run
        # Before the first validation, Lightning warns.
        if self.monitor is not None and self.save_top_k and self.monitor not in monitor_candidates and has_validated:
            logged = [name for name in monitor_candidates if name not in ("epoch", "step")]
            message = describe_unknown_monitor(self.monitor, logged)
            # All ranks raise it, so all of them save; what was trained is not lost.
            self._save_last_checkpoint(trainer, monitor_candidates)
            if self._background is not None:
                self._background.wait()
                # The errors of all ranks name the checkpoint.
                trainer.strategy.barrier()
            raise ConfigError([Problem("checkpoint.monitor", message)])
        self._fresh = None
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    @override
    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        self._share_last(trainer, monitor_candidates)
        if self._schedule is not None and self._began is not None:
            self._schedule.saved(trainer, time.monotonic() - self._began)

    def _share_last(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        fresh, self._fresh = self._fresh, None
        if fresh is None or self._background is None:
            super()._save_last_checkpoint(trainer, monitor_candidates)
            self._fresh = None
            return
        # One copy of the state and one file with two names: a second save would wait for the first.
        last = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        self._paths["last"] = self._last_checkpoint_saved = last
        if trainer.is_global_zero:
            self._background.after_write(functools.partial(publish_again_explained, Path(fresh), Path(last)))

    @override
    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        remove = functools.partial(super()._remove_checkpoint, trainer, filepath)
        if self._background is None:
            remove()
        else:
            # Not before the new one has its name.
            self._background.after_write(remove)

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self._background is None or any(map(reads_files, trainer.loggers if self._informs(trainer) else ())):
            self._save(trainer, filepath)
            return
        with self._background.opened():
            # A resume from it continues as one from `last.ckpt`, which it becomes too.
            self._paths["last"] = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            self._save(trainer, filepath)
        self._fresh = filepath

    def _informs(self, trainer: pl.Trainer) -> bool:
        """Whether the loggers, which may upload checkpoints, get these: the user has none."""
        return trainer.checkpoint_callback is self

    def _save(self, trainer: pl.Trainer, filepath: str) -> None:
        if self._informs(trainer):
            super()._save_checkpoint(trainer, filepath)
            return
        trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath


class LastCheckpointWriter(pl.Callback):
    """Saves at the end of the training, which Lightning skips if a validation saved shortly before."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._saved = -1

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved = trainer.global_step

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved != trainer.global_step:
            trainer.save_checkpoint(self._checkpoint, weights_only=False)


class PlanRecorder(pl.Callback):
    """Writes precision, strategy and number of ranks into each checkpoint, for the run that resumes from it.

    The resumed run gets a notice if the batch of a step changes with the number of ranks: `keeps_batch` is whether the
    user fixed `global_batch_size`.
    """

    def __init__(self, plan: Plan, notice: Callable[[str], None], *, keeps_batch: bool) -> None:
        self._record = make_record(plan.precision, plan.strategy.name, plan.world_size)
        self._batch, self._notice, self._keeps_batch = plan.batch, notice, keeps_batch

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RECORD] = dict(self._record)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        record = checkpoint.get(RECORD)
        # Checkpoints of other programs have no record.
        ranks = record.get("world_size") if isinstance(record, Mapping) else None
        if isinstance(ranks, int) and ranks != self._batch.world_size and not self._keeps_batch:
            self._notice(describe_other_batch(ranks, self._batch))


def describe_other_batch(before: int, batch: BatchSplit) -> str:
    """The notice that a run continues on another number of ranks than the `before` ones of its checkpoint."""
    now = batch.global_batch_size
    old = dataclasses.replace(batch, world_size=before).global_batch_size
    sizes = "" if now is None else f" from {old} to {now} samples"
    size = "the former size" if old is None else str(old)
    ranks = f"{before} rank{'' if before == 1 else 's'}"
    if old is not None and old % (batch.world_size * batch.accumulate):
        # These ranks cannot share it.
        return (
            f"the checkpoint was trained on {ranks} and this run has {batch.world_size}: the batch of a step "
            f"changes{sizes}; continue on {ranks} to keep it"
        )
    return (
        f"the checkpoint was trained on {ranks} and this run has {batch.world_size}: the batch of a step "
        f"changes{sizes}; continue on {ranks}, or set global_batch_size to {size}"
    )


def describe_unknown_monitor(monitor: str, logged: Sequence[str]) -> str:
    """The message about a metric that the model does not log."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(logged)}
    close = difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", monitor.lower()), plain, n=1)
    advice = (
        f"did you mean {escape_controls(plain[close[0]])}?"
        if close
        else f"give one of them, or log {monitor!r} in the model"
    )
    return f"given {monitor!r}, but the model logs {', '.join(map(escape_controls, logged)) or 'no metric'}; {advice}"


def hide_multiple_checkpoints_warning(trainer: pl.Trainer) -> None:
    """Keep `test(ckpt_path="best")` from warning of several `ModelCheckpoint`s if the user has one at most."""
    connected: Any = trainer
    connected._checkpoint_connector.__class__ = _Connector


class _Connector(_CheckpointConnector):
    @override
    def _parse_ckpt_path(self, *arguments: Any, **options: Any) -> Any:
        own = [each for each in self.trainer.checkpoint_callbacks if not isinstance(each, RunCheckpoint)]
        with warnings.catch_warnings():
            if len(own) < 2:
                warnings.filterwarnings("ignore", message=".*configured with multiple `ModelCheckpoint` callbacks.*")
            return super()._parse_ckpt_path(*arguments, **options)


def find_best_checkpoint(trainer: pl.Trainer) -> tuple[Path | str | None, str | None]:
    """Path or URL of the best checkpoint by the first callback with a monitor, the user's first, and the monitor.

    Without a monitor, the checkpoint that the first callback saved last; None if there is none.
    """
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    saved = [each for each in callbacks if each.best_model_path]
    chosen = next((each for each in saved if each.monitor is not None), next(iter(saved), None))
    if chosen is None:
        return None, None
    place = chosen.best_model_path
    return Path(place) if _is_local_file_protocol(place) else place, chosen.monitor


def accept_file_urls(callbacks: Iterable[pl.Callback]) -> None:
    """Let a `ModelCheckpoint` save to a `file://` URL, which Lightning treats as a folder named `file:`."""
    wrong_folder = os.path.realpath("file:") + os.sep
    for each in callbacks:
        if isinstance(each, ModelCheckpoint) and each.dirpath is not None:
            folder = str(each.dirpath)
            if folder.startswith(wrong_folder):
                each.dirpath = os.sep + folder.removeprefix(wrong_folder)
