"""What came of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.planning.plan import Plan


@dataclass(frozen=True)
class FitResult:
    """What came of a run.

    Attributes:
        run: its directory.
        plan: what was trained with.
        metrics: the last value of every metric.
        steps: optimizer steps done.
        checkpoint: the checkpoint to go on from, None if none was written.
        best: the best checkpoint by the monitor of the user's own ModelCheckpoint, else by `checkpoint.monitor`, else
            the last; a URL where it was saved to one; None if none was written.
        trainer: Lightning's, after the fit.
        monitor: what `best` is the best by, None where it is the last.
    """

    run: Path
    plan: Plan
    metrics: Mapping[str, float]
    steps: int
    checkpoint: Path | None
    best: Path | str | None = None
    trainer: Any = None
    monitor: str | None = None
