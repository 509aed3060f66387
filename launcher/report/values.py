"""A run as plain values, for `launcher report --json`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from launcher.report.overview import list_figures
from launcher.report.records import AttemptRecord
from launcher.report.source import Run


def to_values(run: Run) -> dict[str, Any]:
    """Outcome, figures, attempts and alerts of a run, as JSON values.

    Returns:
        Times in seconds since the epoch, durations in seconds, memory in bytes. A figure that is not a number is its
        text; one that is not finite is null.
    """
    history = run.history
    return {
        "name": run.name,
        "path": str(run.path),
        "outcome": history.outcome,
        "steps": history.last_step,
        "figures": {f.label: f.value if f.amount is None else _finite(f.amount) for f in list_figures(run)},
        "attempts": [_attempt(attempt, history.repeated_steps.get(attempt.number, 0)) for attempt in history.attempts],
        "alerts": [dataclasses.asdict(alert) for alert in history.alerts],
        "problems": list(run.problems),
    }


def _attempt(attempt: AttemptRecord, repeated: int) -> dict[str, Any]:
    names = ("number", "started", "seconds", "outcome", "detail", "failed_rank", "start_step", "end_step")
    memory = attempt.memory
    return {
        **{name: getattr(attempt, name) for name in names},
        "steps_done_again": repeated,
        "memory": None
        if memory is None
        else {
            "planned": memory.planned,
            "measured": {str(rank): peak for rank, peak in memory.measured.items()},
            "measured_by": memory.method,
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
