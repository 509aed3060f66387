"""The callback that reports a training rank's progress to its agent."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from typing_extensions import override

from launcher.process.collectives import count_default_group, dump_flight_record
from launcher.process.rank_status import RankStatusWriter


def heartbeat_callbacks(status: RankStatusWriter) -> list[pl.Callback]:
    """The callback, if the rank has an agent."""
    return [HeartbeatCallback(status)] if status.has_agent else []


class HeartbeatCallback(pl.Callback):
    """Reports each step, validation batch and checkpoint, and how many collectives this rank has entered."""

    def __init__(self, status: RankStatusWriter) -> None:
        self._status = status

    def _beat(self, *_: Any, **__: Any) -> None:
        self._status.beat()

    setup = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_save_checkpoint = _beat

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._status.beat(trainer.global_step)
        if dist.is_initialized():
            self._status.watch_collectives(count_default_group, dump_flight_record)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._status.beat(trainer.global_step)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._status.close()
