"""`FitResult`: the result of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.planning.plan import Plan


@dataclass(frozen=True)
class FitResult:
    """Result of a training.

    Attributes:
        run: the run directory.
        metrics: the last value of every metric.
        steps: number of optimizer steps.
        checkpoint: the checkpoint to resume from, None if none was written.
        best: the best checkpoint by the monitor of the user's own ModelCheckpoint, otherwise by `checkpoint.monitor`,
            otherwise the last one; a URL if it was saved to one; None if none was written.
        trainer: Lightning's Trainer after the fit.
        monitor: the metric that `best` was chosen by, None if it is the last one.
        problem: what was wrong with the training to its end, as a loss that is not finite; None if nothing was.
    """

    run: Path
    plan: Plan
    metrics: Mapping[str, float]
    steps: int
    checkpoint: Path | None
    best: Path | str | None = None
    trainer: Any = None
    monitor: str | None = None
    problem: str | None = None
