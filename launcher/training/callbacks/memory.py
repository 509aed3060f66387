"""The measured memory peak of each rank, comparable with the plan's estimate."""

from __future__ import annotations

import contextlib
from pathlib import Path

import lightning.pytorch as pl
import torch
from typing_extensions import override

from launcher.core.errors import Interrupted
from launcher.core.events import EventLog
from launcher.monitoring.trainer_facts import peak_resident_memory
from launcher.planning.oom import planned_memory
from launcher.planning.plan import Plan
from launcher.training.resume.random_states import gather_states

# Limits the size of the event of a large run.
_RANKS_IN_EVENT = 64


class MeasuredMemory:
    """A rank's memory peak in bytes since this object was created, which must be before the model is created.

    On a GPU it is the peak of torch's allocator. On a CPU it is the growth of the process's resident memory, which
    includes libraries that are loaded later, data loaders and memory that the allocator keeps.
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
            # Only after an earlier training, as in a notebook; otherwise this rank's device is not chosen yet.
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            return
        # Resets VmHWM, so that the peak of the imports does not count; not every kernel has it.
        with contextlib.suppress(OSError):
            clear.write_text("5", encoding="ascii")
        self._base = self._resident("VmRSS")

    @property
    def method(self) -> str:
        """Describe what is measured."""
        if self._on_gpu:
            return "most bytes that torch's allocator had in use on the device"
        return "growth of the process's resident memory since before the model was made"

    def peak(self) -> int:
        """The peak in bytes."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return max(0, self._resident("VmHWM") - self._base)

    def _resident(self, name: str) -> int:
        try:
            lines = self._status.read_text(encoding="ascii", errors="replace").splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
        except (OSError, StopIteration):
            # Not Linux: only the highest value so far is known.
            return peak_resident_memory()


class MemoryReporter(pl.Callback):
    """Rank zero writes an event with the planned and the measured memory of each rank.

    Runs at the end of the training, or when a signal stops all ranks at one step.
    """

    def __init__(self, plan: Plan, measured: MeasuredMemory, events: EventLog) -> None:
        self._plan = plan
        self._measured = measured
        self._events = events

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # After other errors some ranks may not reach this collective.
        if isinstance(exception, Interrupted):
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        states = gather_states({"peak": self._measured.peak()}, pl_module.device)
        peaks = [state["peak"] for state in states]
        if trainer.global_rank == 0:
            shown = sorted(sorted(range(len(peaks)), key=lambda rank: -peaks[rank])[:_RANKS_IN_EVENT])
            planned = planned_memory(self._plan, self._plan.strategy.name)
            self._events.write(
                "memory",
                step=trainer.global_step,
                planned=planned,
                ranks=shown,
                measured=[peaks[rank] for rank in shown],
                measured_by=self._measured.method,
            )
