"""The callback that saves and leaves at the step on which the ranks agreed after a signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import _MockOptimizer
from torch.optim import Optimizer
from typing_extensions import override

from launcher.core.errors import Interrupted
from launcher.training.loops.epoch_loop import after_batch
from launcher.training.stop.agreement import StopAgreement
from launcher.training.stop.signals import SignalListener


class GracefulStop(pl.Callback):
    """After a signal to any rank, all ranks save at the end of the same optimizer step and leave.

    At the last step of an epoch, or one that a validation follows, they save, and save again and leave at the end of
    the next step: a resume would not repeat the validation or the end of the epoch. The first save is used if the ranks
    are killed before the second. Without a `checkpoint` path they leave without saving.
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
        self._listener.progress.trainer = trainer
        # Lightning sets its handlers between on_fit_start and this.
        self._listener.install()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._listener.progress.trainer = trainer
        self._listener.install()
        self._step = trainer.global_step
        # With manual optimization a module may step without Lightning, which then counts no step.
        self._optimizers.watch(trainer.optimizers if not pl_module.automatic_optimization else None)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        has_stepped = self._optimizers.take_stepped()
        if trainer.global_step == self._step and not has_stepped:
            return  # between two micro batches of a step
        self._step = trainer.global_step
        if self._agreement.gate():
            # The module's own hook runs after those of all callbacks and belongs to this step.
            after_batch(trainer, lambda: self._save_and_leave(trainer, batch_idx))

    def _save_and_leave(self, trainer: pl.Trainer, batch_idx: int) -> None:
        if self._checkpoint is not None:
            trainer.save_checkpoint(self._checkpoint, weights_only=False)
        if _is_last_step(trainer):
            return  # the training ends by itself
        is_border = trainer.is_last_batch or _is_validated_after(trainer, batch_idx)
        # Only once: a validation may follow every step.
        if is_border and not self._saved_at_border:
            self._saved_at_border = True
            return
        saved = None if self._checkpoint is None else str(self._checkpoint)
        raise Interrupted(self._agreement.signal_number, checkpoint=saved, step=self._step)


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the training ends with this step, as far as a callback can know."""
    loop, epochs = trainer.fit_loop, trainer.max_epochs
    if trainer.should_stop and loop._can_stop_early:
        return True
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    return trainer.is_last_batch and epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs


def _is_validated_after(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation may follow this batch; the same on every rank."""
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return True  # it depends on each rank's clock
    batches = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (batches + 1) % (trainer.val_check_batch or math.inf) == 0


class OptimizerSteps:
    """Detects steps of optimizers, also those that Lightning does not make."""

    def __init__(self) -> None:
        self._has_stepped = False
        self._is_blind = False

    def watch(self, optimizers: Sequence[Any] | None) -> None:
        """Watch these optimizers; None watches none. With an empty list every batch counts as a step."""
        # Lightning uses this class for "no optimizer".
        own = [each for each in optimizers or () if not isinstance(each, _MockOptimizer)]
        self._has_stepped, self._is_blind = False, optimizers is not None and not own
        for optimizer in own:
            # DeepSpeed's optimizer has no hooks: Lightning counts its steps.
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_post_hook(self._note)

    def take_stepped(self) -> bool:
        """Whether an optimizer has stepped since the last call."""
        has_stepped, self._has_stepped = self._has_stepped, False
        return has_stepped or self._is_blind

    def _note(self, *_: object) -> None:
        self._has_stepped = True
