"""The callback that reports a training rank's progress and phases to its agent."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from typing_extensions import override

from launcher.process.collectives import count_default_group, dump_flight_record
from launcher.process.phases import Phase
from launcher.process.rank_status import RankStatusWriter


def heartbeat_callbacks(status: RankStatusWriter) -> list[pl.Callback]:
    """The callback, if the rank has an agent; the first of all callbacks, so that their time counts to its phases."""
    return [HeartbeatCallback(status)] if status.has_agent else []


class HeartbeatCallback(pl.Callback):
    """Reports steps, evaluation batches and checkpoints, each phase, and how many collectives this rank has entered."""

    def __init__(self, status: RankStatusWriter) -> None:
        self._status = status
        self._first_step: int | None = None  # until the first optimizer step of this process is done

    def _start_evaluation(self, *_: Any, **__: Any) -> None:
        self._status.enter_phase(Phase.EVALUATION_START)

    def _start_evaluation_step(self, *_: Any, **__: Any) -> None:
        self._status.enter_phase(Phase.EVALUATION_STEP)

    def _end_evaluation_step(self, *_: Any, **__: Any) -> None:
        self._status.beat()
        self._status.enter_phase(Phase.BETWEEN_EVALUATION_STEPS)

    def _end_evaluation(self, *_: Any, **__: Any) -> None:
        self._status.enter_phase(Phase.EVALUATION_END)

    def _end(self, *_: Any, **__: Any) -> None:
        self._status.enter_phase(Phase.ENDING)

    on_validation_start = on_test_start = on_predict_start = _start_evaluation
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _start_evaluation_step
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _end_evaluation_step
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _end_evaluation
    on_train_end = on_exception = _end

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._status.beat()
        self._status.enter_phase(Phase.SETUP)

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._status.enter_phase(Phase.SETUP)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._status.beat(trainer.global_step)
        self._first_step = trainer.global_step
        self._status.enter_phase(Phase.FIRST_STEP)
        if dist.is_initialized():
            self._status.watch_collectives(count_default_group, dump_flight_record)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_step is None:
            self._status.enter_phase(Phase.EPOCH_START)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._status.enter_phase(Phase.STEP if self._first_step is None else Phase.FIRST_STEP)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._status.beat(step)
        self._status.enter_phase(Phase.BETWEEN_STEPS)
        if self._first_step is not None and step > self._first_step:
            self._first_step = None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._status.enter_phase(Phase.EPOCH_END)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._status.beat()
        self._status.enter_phase(Phase.CHECKPOINT)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._status.close()
        self._status.enter_phase(Phase.ENDED)
