"""A run as plain values, for programs."""

from __future__ import annotations

import math
from typing import Any

from launcher.report.overview import figures_of
from launcher.report.records import AttemptRecord, lost_steps
from launcher.report.source import Run


def to_values(run: Run) -> dict[str, Any]:
    """Outcome, figures, attempts and alerts of a run as JSON takes them.

    Returns:
        Times are seconds since the epoch, durations seconds, memory bytes; a figure without a number is its text, one
        that is not finite null.
    """
    history = run.history
    lost = lost_steps(history.attempts)
    return {
        "name": run.name,
        "path": str(run.path),
        "outcome": history.outcome,
        "steps": history.last_step,
        "figures": {f.label: f.value if f.amount is None else _finite(f.amount) for f in figures_of(run)},
        "attempts": [_attempt(attempt, lost.get(attempt.number, 0)) for attempt in history.attempts],
        "alerts": [
            {"time": a.time, "step": a.step, "kind": a.kind, "title": a.title, "text": a.text, "ranks": list(a.ranks)}
            for a in history.alerts
        ],
        "problems": list(run.problems),
    }


def _attempt(attempt: AttemptRecord, lost: int) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "started": attempt.started,
        "seconds": attempt.seconds,
        "outcome": attempt.outcome,
        "detail": attempt.detail,
        "failed_rank": attempt.failed_rank,
        "start_step": attempt.start_step,
        "end_step": attempt.end_step,
        "steps_done_again": lost,
        "memory": None
        if attempt.memory is None
        else {
            "planned": attempt.memory.planned,
            "measured": {str(rank): peak for rank, peak in attempt.memory.measured.items()},
            "measured_by": attempt.memory.method,
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
