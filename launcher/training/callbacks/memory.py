"""The memory that a rank really needed, so measured that it may stand beside what the plan expected."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from typing_extensions import override

from launcher.core.errors import Interrupted
from launcher.core.events import EventLog
from launcher.planning.oom import planned_memory
from launcher.planning.plan import Plan

# More would make an event of a large run longer than it is useful.
_RANKS_IN_EVENT = 64
_ALLOCATOR = "most bytes that torch's allocator had in use on the device"
_GROWTH = "growth of the process's resident memory since before the model was made"


class MeasuredMemory:
    """A rank's peak since this was made; make it before the model is.

    On a GPU torch's allocator keeps the account. A CPU's does not: there it is how far the resident memory of the
    process grew, in which libraries loaded later, loaders and what the allocator keeps are counted too.

    Args:
        device_kind: 'cpu', 'cuda' or 'mps'.
        status, clear: of this process, as Linux has them.
    """

    def __init__(
        self,
        device_kind: str,
        status: Path = Path("/proc/self/status"),
        clear: Path = Path("/proc/self/clear_refs"),
    ) -> None:
        self._on_gpu = device_kind == "cuda"
        self._status = status
        self._base = 0
        if self._on_gpu:
            # Of a training before, in a notebook; else CUDA is not initialised yet, nor this rank's device chosen.
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            return
        # Else the peak of the imports would count, as it does on a kernel without it.
        with contextlib.suppress(OSError):
            clear.write_text("5", encoding="ascii")
        self._base = self._resident("VmRSS")

    @property
    def method(self) -> str:
        """What is measured, in words."""
        return _ALLOCATOR if self._on_gpu else _GROWTH

    def peak(self) -> int:
        """Bytes."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return max(0, self._resident("VmHWM") - self._base)

    def _resident(self, name: str) -> int:
        try:
            lines = self._status.read_text(encoding="ascii", errors="replace").splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
        except (OSError, StopIteration):
            # Not Linux: the highest so far is all that is known. macOS counts in bytes.
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return most if sys.platform == "darwin" else most * 1024


class MemoryReporter(pl.Callback):
    """Rank zero tells the events what the plan expected and what each rank needed.

    At the end of the training, or where a signal stops it on all ranks at one step.

    Args:
        plan: what was trained with.
        measured: this rank's.
        events: the run's.
    """

    def __init__(self, plan: Plan, measured: MeasuredMemory, events: EventLog) -> None:
        self._plan = plan
        self._measured = measured
        self._events = events

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # After anything else the ranks may not come together.
        if isinstance(exception, Interrupted):
            self._tell(trainer, pl_module)

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peaks = _of_all_ranks(self._measured.peak(), pl_module.device)
        if trainer.global_rank == 0:
            shown = sorted(sorted(range(len(peaks)), key=lambda rank: -peaks[rank])[:_RANKS_IN_EVENT])
            planned: dict[str, Any] | None = planned_memory(self._plan, self._plan.strategy.name)
            self._events.write(
                "memory",
                step=trainer.global_step,
                planned=planned,
                ranks=shown,
                measured=[peaks[rank] for rank in shown],
                measured_by=self._measured.method,
            )


def _of_all_ranks(peak: int, device: torch.device) -> list[int]:
    """Every rank's, in their order."""
    if not dist.is_initialized():
        return [peak]
    group = dist.group.WORLD
    own = torch.tensor([peak], dtype=torch.int64, device=device)
    found = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [int(one.item()) for one in found]
