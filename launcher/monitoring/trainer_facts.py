"""Reads facts of any Trainer, of either Lightning package, and of its device. None of these functions raises."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def attribute(owner: Any, name: str) -> Any:
    """Return an attribute; None if it is missing or its getter raises, as Lightning's do outside of a fit."""
    with contextlib.suppress(Exception):
        return getattr(owner, name, None)
    return None


def steps_done(trainer: Any) -> int:
    """Optimizer steps done; 0 outside of a fit."""
    step = attribute(trainer, "global_step")
    return step if isinstance(step, int) else 0


def logger_step(trainer: Any, *, is_epoch_end: bool) -> int:
    """The step at which Lightning logs the metrics of this batch, or of this epoch, which has its last batch's."""
    loop = attribute(attribute(trainer, "fit_loop"), "epoch_loop")
    batches = attribute(loop, "_batches_that_stepped")
    if not isinstance(batches, int):
        return max(steps_done(trainer) - 1, 0)
    # After a batch Lightning counts it late; after an epoch it has counted all.
    return max(batches - is_epoch_end, 0)


def is_rank_zero(trainer: Any) -> bool:
    """Whether this process is rank zero, which logs."""
    zero = attribute(trainer, "is_global_zero")
    return bool(zero) if isinstance(zero, bool) else not attribute(trainer, "global_rank")


def loss_not_finite(outputs: Any) -> float | Tensor:
    """Whether the step's loss is infinite or NaN; stays on the loss's device."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        return 0.0
    return ~torch.isfinite(loss.detach()).all()


def peak_memory() -> int:
    """Peak memory in bytes: allocated on the device, resident on a CPU. Does not wait for the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """Peak memory of this process on the host, in bytes."""
    # Linux counts in KiB, macOS in bytes.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
