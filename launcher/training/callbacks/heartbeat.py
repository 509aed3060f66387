"""The callback by which a training rank tells its agent that it lives."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from launcher.process.rank_status import RankStatusWriter


def heartbeat_callbacks(report: RankStatusWriter) -> list[pl.Callback]:
    """The callback, if an agent listens."""
    return [HeartbeatCallback(report)] if report.has_agent else []


class HeartbeatCallback(pl.Callback):
    """Tells each step, validation batch and checkpoint, and how many collectives this rank has entered.

    Args:
        report: what the agent reads.
    """

    def __init__(self, report: RankStatusWriter) -> None:
        self._report = report

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._report.beat()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report.beat(trainer.global_step)
        if dist.is_initialized():
            group = dist.distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
            count = group._get_sequence_number_for_group  # pyright: ignore[reportAttributeAccessIssue] -- not in the stubs
            self._report.watch_collectives(count, flight_record)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._report.beat(trainer.global_step)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._report.beat()

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._report.beat()

    on_predict_batch_end = on_test_batch_end

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._report.beat()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._report.close()


def flight_record() -> str:
    """What torch's flight recorder knows of this rank's collectives, as JSON."""
    c10d: Any = vars(torch._C)["_distributed_c10d"]
    # A build with NCCL has a recorder for it, beside that of the other backends.
    nccl = dist.get_backend() == "nccl" and hasattr(c10d, "_dump_nccl_trace_json")
    text: bytes | str = c10d._dump_nccl_trace_json() if nccl else c10d._dump_fr_trace_json()
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
