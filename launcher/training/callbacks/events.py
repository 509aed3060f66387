"""Callbacks of every run: stop together at a step boundary, tell the events, and lines for a terminal without a bar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import _MockOptimizer
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from launcher.checkpoint.precision import RECORD, record_of
from launcher.core.errors import Interrupted
from launcher.core.events import EventLog
from launcher.planning.plan import Plan
from launcher.training.loops.batch_end import after_batch
from launcher.training.stop.agreement import SignalListener, StopAgreement

# Layer-wise rates come in dozens; the first ones show the schedule.
_RATES_IN_EVENT = 8


class GracefulStop(pl.Callback):
    """After a signal to any rank: all ranks save at the end of the same optimizer step, then leave.

    At the last step of an epoch, or one that a validation follows, they save in case that they are killed, and leave at
    the end of the next step: a resume would not make up for the validation, nor for what else ends an epoch.

    Args:
        agreement: the ranks' common decision.
        listener: takes the signals anew once Lightning has set its own handlers.
        checkpoint: where to save, None to leave without a checkpoint.
    """

    def __init__(self, agreement: StopAgreement, listener: SignalListener, checkpoint: Path | None) -> None:
        self._agreement = agreement
        self._listener = listener
        self._checkpoint = checkpoint
        self._step = -1
        self._optimizers = OptimizerSteps()
        self._saved_at_border = False

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning sets its handlers between on_fit_start and this.
        self._listener.install()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listener.install()
        self._step = trainer.global_step
        # A module that optimizes by hand may step without Lightning, which then counts no step.
        self._optimizers.watch(trainer.optimizers if not pl_module.automatic_optimization else None)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = self._optimizers.stepped()
        if trainer.global_step == self._step and not stepped:
            return  # in the middle of an accumulation
        self._step = trainer.global_step
        if self._agreement.gate():
            # The module's own hook comes after all callbacks', and belongs to this step.
            after_batch(trainer, lambda: self._save_and_leave(trainer, batch_idx))

    def _save_and_leave(self, trainer: pl.Trainer, batch_idx: int) -> None:
        if self._checkpoint is not None:
            trainer.save_checkpoint(self._checkpoint, weights_only=False)
        if _is_last_step(trainer):
            return  # the training ends here by itself
        border = trainer.is_last_batch or _validates_after(trainer, batch_idx)
        # Once: every step may be one that a validation follows.
        if border and not self._saved_at_border:
            self._saved_at_border = True
            return
        saved = None if self._checkpoint is None else str(self._checkpoint)
        raise Interrupted(self._agreement.signal_number, checkpoint=saved, step=self._step)


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the training ends with this step, as far as a callback can tell."""
    loop, epochs = trainer.fit_loop, trainer.max_epochs
    if trainer.should_stop and loop._can_stop_early:
        return True
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs


def _validates_after(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation may follow this batch; the same on every rank."""
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return True  # it depends on each rank's clock
    batches = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (batches + 1) % (trainer.val_check_batch or math.inf) == 0


class OptimizerSteps:
    """Whether optimizers have stepped, whoever called them."""

    def __init__(self) -> None:
        self._has_stepped = False
        self._is_blind = False

    def watch(self, optimizers: Sequence[Any] | None) -> None:
        """Look at these from now on; None for none. Without any to look at, every batch counts as a step."""
        # Lightning stands in for no optimizer.
        own = [each for each in optimizers or () if not isinstance(each, _MockOptimizer)]
        self._has_stepped, self._is_blind = False, optimizers is not None and not own
        for optimizer in own:
            # DeepSpeed's optimizer has no hooks: Lightning counts its steps.
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_post_hook(self._note)

    def stepped(self) -> bool:
        """Whether one has stepped since the last call."""
        stepped, self._has_stepped = self._has_stepped, False
        return stepped or self._is_blind

    def _note(self, *_: object) -> None:
        self._has_stepped = True


class LastCheckpointWriter(pl.Callback):
    """Saves the end of the training, which Lightning leaves out if a validation saved shortly before.

    Args:
        checkpoint: where.
    """

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
    """Writes into each checkpoint what it was trained with, for whoever goes on from it."""

    def __init__(self, plan: Plan) -> None:
        self._record = record_of(plan.precision, plan.strategy.name, plan.world_size)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RECORD] = dict(self._record)


class EventWriter(pl.Callback):
    """Rank zero's account of the training: steps at the logging interval, validations, checkpoints.

    Attributes:
        batches: trained by this process so far.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self.batches = 0
        self._step = -1
        self._since: tuple[float, int] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._events.write("training_started", step=trainer.global_step, epoch=trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        step = trainer.global_step
        if step == self._step or not trainer.is_global_zero:
            return
        self._step = step
        if self._since is None:
            # The first step carries the warm-up; speed is counted from its end.
            self._since = (time.perf_counter(), step)
            self._events.write("first_step", step=step)
        elif step % _interval(trainer) == 0:
            now = time.perf_counter()
            before, before_step = self._since
            self._since = (now, step)
            seconds = (now - before) / max(step - before_step, 1)
            self._events.write("step", step=step, epoch=trainer.current_epoch, seconds_per_step=seconds,
                               metrics=as_numbers(trainer.logged_metrics),
                               learning_rate=learning_rates(trainer))  # fmt: skip

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.is_global_zero:
            self._events.write("checkpoint", step=trainer.global_step, epoch=trainer.current_epoch)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._events.write("validation", step=trainer.global_step, metrics=as_numbers(trainer.callback_metrics))
        self._since = None if self._since is None else (time.perf_counter(), trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._events.write("training_ended", step=trainer.global_step, epoch=trainer.current_epoch)


class ProgressLines(pl.Callback):
    """One line at each logging interval, where a progress bar would only fill a file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = 0.0
        self._first = 0
        self._step = -1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first = time.perf_counter(), trainer.global_step
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or step % _interval(trainer):
            return
        self._step = step
        speed = (step - self._first) / max(time.perf_counter() - self._began, 1e-9)
        total = trainer.estimated_stepping_batches
        of = f"/{total:g}" if total not in (-1, float("inf")) else ""
        self._print(f"step {step}{of}  {_shown(trainer.progress_bar_metrics)}  {speed:.1f} steps/s")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            validated = {k: v for k, v in trainer.progress_bar_metrics.items() if "val" in k}
            self._print(f"validation at step {trainer.global_step}  {_shown(validated)}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one element as Python numbers; reads them from the device."""
    return {k: float(v) for k, v in metrics.items() if not isinstance(v, Tensor) or v.numel() == 1}


def learning_rates(trainer: pl.Trainer) -> list[float]:
    """Of the next step, in the order of the optimizers' parameter groups; groups with equal rates count once."""
    rates = [
        float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups if "lr" in group
    ]
    return list(dict.fromkeys(rates))[:_RATES_IN_EVENT]


def _interval(trainer: pl.Trainer) -> int:
    """Steps between two reports: Lightning's own, which is set late and not declared."""
    return max(getattr(trainer, "log_every_n_steps", 0), 1)


def _shown(metrics: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in metrics.items() if k != "v_num"}
    return "  ".join(f"{k} {float(v):.4g}" for k, v in shown.items())
