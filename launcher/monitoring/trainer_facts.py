"""What a callback reads off anybody's Trainer, of whichever Lightning, and off its device; none of it raises."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def attribute(owner: Any, name: str) -> Any:
    """An attribute; None if it is missing or its getter raises, as Lightning's do outside of a fit."""
    with contextlib.suppress(Exception):
        return getattr(owner, name, None)
    return None


def steps_done(trainer: Any) -> int:
    """Optimizer steps done; 0 outside of a fit."""
    step = attribute(trainer, "global_step")
    return step if isinstance(step, int) else 0


def is_rank_zero(trainer: Any) -> bool:
    """Whether this process is the one that logs."""
    zero = attribute(trainer, "is_global_zero")
    return bool(zero) if isinstance(zero, bool) else not attribute(trainer, "global_rank")


def loss_not_finite(outputs: Any) -> float | Tensor:
    """Whether the step's loss is infinite or NaN; stays on the loss's device."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        return 0.0
    return ~torch.isfinite(loss.detach()).all()


def peak_memory() -> int:
    """Bytes; neither of the two asks the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
