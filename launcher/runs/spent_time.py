"""How the time of one attempt's training divides into kinds, by the seconds in its events. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.runs.event_clock import as_micro

# Kinds that rank zero measures; the rest of the time is spent in hooks, loggers and ends of epochs.
MEASURED: tuple[str, ...] = ("step", "data", "validation", "checkpoint")
_EACH_STEP = ("step", "data", "other")
_AT_TIMES = ("validation", "checkpoint")


class SpentTime:
    """Of one attempt, from its `training_started`, with optimizer steps done by then; all times in microseconds."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.has_stepped = False
        self.has_ended = False
        self._counters = dict.fromkeys(MEASURED, 0)
        # Since the first step.
        self._sums = dict.fromkeys((*MEASURED, "other"), 0)
        self._steps = 0

    def measure(self, spent: Mapping[str, Any], gap: int) -> dict[str, int]:
        """The parts of a gap that ends with an event with the seconds `spent` since the start of the training."""
        now = {kind: as_micro(spent.get(kind)) or 0 for kind in MEASURED}
        parts = {kind: max(now[kind] - self._counters[kind], 0) for kind in MEASURED}
        self._counters = now
        return fill(parts, gap)

    def advance(self, parts: Mapping[str, int], step: int) -> None:
        """Remember the parts of an interval that ends with this step, for `estimate`."""
        if self.has_stepped:
            for kind, amount in parts.items():
                self._sums[kind] += amount
            self._steps += max(step - self.step, 0)
        self.step = max(self.step, step)

    def estimate(self, step: int, gap: int) -> dict[str, int]:
        """The parts of a gap without measurement, in which the training came to this step.

        The steps took the mean time of the steps before; validations and checkpoints took the rest if there was any.
        """
        each = {kind: self._sums[kind] for kind in _EACH_STEP}
        at_times = {kind: self._sums[kind] for kind in _AT_TIMES}
        if not sum(each.values()):
            each["step"] = 1
        mean = sum(each.values()) // max(self._steps, 1)
        needed = max(step - self.step, 0) * mean
        rest = gap - needed
        if rest <= mean or not sum(at_times.values()):
            return share(each, gap)
        return {**share(each, needed), **share(at_times, rest)}


def fill(parts: Mapping[str, int], gap: int) -> dict[str, int]:
    """The parts and the rest as `other`, together the gap; parts that are too long are shortened."""
    total = sum(parts.values())
    shown = dict(parts) if total <= gap else share(parts, gap)
    return {**shown, "other": shown.get("other", 0) + gap - sum(shown.values())}


def share(weights: Mapping[str, int], amount: int) -> dict[str, int]:
    """The amount in proportion to the weights; the largest part takes the rest of the division."""
    total = sum(weights.values())
    parts = {kind: amount * weight // total for kind, weight in weights.items()}
    largest = max(weights, key=lambda kind: weights[kind])
    parts[largest] += amount - sum(parts.values())
    return parts
