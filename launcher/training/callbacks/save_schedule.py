"""`checkpoint.every: auto`: after each save, rank zero decides when all ranks save next."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

import lightning.pytorch as pl

from launcher.checkpoint.save_interval import FailureHistory, SaveInterval, choose_interval
from launcher.core.events import EventLog

# Optimizer steps before the first save, which measures what a save costs.
FIRST = 10
_MEASURED = 5  # saves


class SaveSchedule:
    """The step of the next save, equal on all ranks; a decision costs one broadcast at each save, and no step.

    Args:
        events: rank zero's; gets an event for each new interval.
        history: the run's failures until now; rank zero calls it once.
        write_seconds: how long the last write in the background took.
    """

    def __init__(
        self, events: EventLog, history: Callable[[], FailureHistory], write_seconds: Callable[[], float]
    ) -> None:
        self._events, self._history, self._write_seconds = events, history, write_seconds
        self._failures: FailureHistory | None = None
        self._costs: deque[float] = deque(maxlen=_MEASURED)
        self._next: int | None = None
        self._before = FIRST
        self._shown: int | None = None
        self._mark = (0.0, 0)

    def is_due(self, step: int) -> bool:
        """Whether to save after this optimizer step."""
        if self._next is None:
            self._next = step + FIRST
            # Without the first step, which is slower.
            self._mark = (time.monotonic(), step)
        return step >= self._next

    def saved(self, trainer: pl.Trainer, cost: float) -> None:
        """All ranks call it after a save that took `cost` seconds of the training."""
        steps = 0
        if trainer.is_global_zero:
            steps = self._decide(trainer.global_step, cost)
        steps = int(trainer.strategy.broadcast(steps))
        self._before, self._next = steps, trainer.global_step + steps

    def _decide(self, step: int, cost: float) -> int:
        if self._failures is None:
            self._failures = self._history()
        self._costs.append(cost)
        since, before = self._mark
        self._mark = (time.monotonic(), step)
        seconds = (self._mark[0] - since - cost) / max(step - before, 1)
        middle = statistics.median(self._costs)
        decision = choose_interval(
            middle, max(self._write_seconds(), middle), max(seconds, 1e-6), self._failures, self._before
        )
        self._show(decision, step, middle)
        return decision.steps

    def _show(self, decision: SaveInterval, step: int, cost: float) -> None:
        """An event for an interval that differs by a tenth or more from the one shown last."""
        if self._shown is not None and abs(decision.steps - self._shown) * 10 < self._shown:
            return
        self._shown = decision.steps
        self._events.write("checkpoint_interval", step=step, steps=decision.steps, seconds=decision.seconds,
                           cost=cost, reason=decision.reason)  # fmt: skip
