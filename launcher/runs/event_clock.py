"""One time line for the events of several processes, whose clocks may be set back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MICRO = 1_000_000
# Seconds since the epoch; later ones are damaged.
_LATEST = 1e11
# Events of one process are in order, so one that goes back further shows that its clock was set back.
_JITTER = _MICRO


def as_micro(value: Any) -> int | None:
    """Seconds as microseconds; None if it is not a finite number of at least 0."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value < _LATEST:
        return None
    return round(value * _MICRO)


class EventClock:
    """The time of the events in microseconds, which never goes back.

    Attributes:
        now: of the newest event.
        before: of the event before it.
    """

    def __init__(self) -> None:
        self.now = self.before = 0
        self._offset = 0
        self._is_started = False
        self._last: dict[Any, int] = {}

    def add(self, event: Mapping[str, Any]) -> bool:
        """Set the clock to an event; False if the event has no valid time."""
        time, rank = as_micro(event.get("time")), event.get("rank")
        if time is None or type(rank) is not int:
            return False
        last = self._last.get(rank)
        if last is not None and time < last - _JITTER:
            # The next events of the other ranks go back too.
            self._offset += last - time
            self._last.clear()
        self._last[rank] = time
        self.before, self.now = self.now, max(self.now, time + self._offset)
        if not self._is_started:
            self._is_started, self.before = True, self.now
        return True

    def find(self, value: Any) -> int | None:
        """A time that an event names, in seconds since the epoch, on this time line; None if it is later or damaged."""
        time = as_micro(value)
        return None if not time or time + self._offset > self.now else time + self._offset
