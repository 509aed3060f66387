"""Reports running statistics that hold NaN or infinity, after a skipped fp16 step and before they are saved.

A skipped step leaves the weights unchanged, but a batch norm has already used the batch's mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from launcher.core.events import EventLog
from launcher.monitoring.health import Alert
from strategies.loss_scale import CountingGradScaler, LossScaleError, find_loss_scale

_SHOWN = 5
_ADVICE = (
    "they do not recover by themselves: resume from an earlier checkpoint, or call reset_running_stats() on these "
    "modules, and compute them in fp32 (torch.autocast(..., enabled=False))"
)


class BufferMonitor(pl.Callback):
    """Checks a module's buffers after a skipped optimizer step, and before a checkpoint is written.

    Args:
        alert: receives the alerts of rank zero.
        events: receive the alerts of other ranks.
        notice: receives a text once for each set of such buffers in a checkpoint.
    """

    def __init__(self, alert: Callable[[Alert, int], None], events: EventLog, notice: Callable[[str], None]) -> None:
        self._alert = alert
        self._events = events
        self._notice = notice
        self._constant: frozenset[str] = frozenset()
        self._skipped = 0
        self._alerted: frozenset[str] = frozenset()
        self._noticed: frozenset[str] = frozenset()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # An attention mask holds infinity by design; running statistics never do.
        norms = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in pl_module.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for name, _ in module.named_buffers(recurse=False)
        }
        self._constant = frozenset(find_non_finite_buffers(pl_module)) - norms
        self._skipped = skipped_steps(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        skipped = skipped_steps(trainer)
        if skipped == self._skipped:
            return
        self._skipped = skipped
        found = self._not_finite(pl_module)
        if found and not self._alerted:
            rank, step = trainer.global_rank, trainer.global_step
            # DDP broadcasts rank zero's buffers in each forward pass.
            is_broadcast = rank != 0 and isinstance(trainer.strategy.model, DistributedDataParallel)
            what_to_do = "rank 0's replace them in the next step" if is_broadcast else _ADVICE
            alert = Alert(
                "buffers_not_finite",
                f"running statistics of rank {rank} are not finite",
                f"{_join(found)} hold NaN or infinity on rank {rank} after a skipped step; {what_to_do}",
                (rank,),
            )
            if trainer.is_global_zero:
                self._alert(alert, step)
            else:
                self._events.write("alert", alert=alert.kind, step=step, ranks=list(alert.ranks), title=alert.title,
                                   text=alert.text)  # fmt: skip
        self._alerted = frozenset(found)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not trainer.is_global_zero:
            return
        found = frozenset(self._not_finite(pl_module))
        if found - self._noticed:
            self._notice(
                f"the checkpoint of step {trainer.global_step} holds NaN or infinity in {_join(sorted(found))}: "
                f"{_ADVICE}"
            )
        self._noticed = found

    def _not_finite(self, module: nn.Module) -> list[str]:
        return [name for name in find_non_finite_buffers(module) if name not in self._constant]


def find_non_finite_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that hold NaN or infinity; waits once for each device."""
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and buffer.numel() and not buffer.is_meta:
            by_device.setdefault(buffer.device, {})[name] = buffer
    found: list[str] = []
    for buffers in by_device.values():
        finite = torch.stack([buffer.isfinite().all() for buffer in buffers.values()]).tolist()
        found += [name for name, fine in zip(buffers, finite, strict=True) if not fine]
    return found


def skipped_steps(trainer: Any) -> int:
    """Optimizer steps skipped so far, as far as the host knows without waiting for the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if isinstance(scaler, CountingGradScaler):
        return scaler.seen_skips
    if scaler is not None:
        return 0
    try:
        live = find_loss_scale(trainer)
    except LossScaleError:
        return 0  # RankMonitor reports it
    return live.skipped_steps if live is not None and isinstance(live.skipped_steps, int) else 0


def _join(names: Iterable[str]) -> str:
    all_names = list(names)
    more = f" and {len(all_names) - _SHOWN} more buffers" if len(all_names) > _SHOWN else ""
    return ", ".join(all_names[:_SHOWN]) + more
