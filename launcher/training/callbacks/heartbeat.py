"""The callback that reports a training rank's progress to its agent."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

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
            group = dist.distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
            count = group._get_sequence_number_for_group  # pyright: ignore[reportAttributeAccessIssue] -- not in the stubs
            self._status.watch_collectives(count, flight_record)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._status.beat(trainer.global_step)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._status.close()


def flight_record() -> str:
    """This rank's collectives from torch's flight recorder, as JSON."""
    c10d: Any = vars(torch._C)["_distributed_c10d"]
    # A build with NCCL has a separate recorder for it.
    nccl = dist.get_backend() == "nccl" and hasattr(c10d, "_dump_nccl_trace_json")
    text: bytes | str = c10d._dump_nccl_trace_json() if nccl else c10d._dump_fr_trace_json()
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
