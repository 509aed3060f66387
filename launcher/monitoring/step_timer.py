"""Measures a rank's step time, and its part without waiting for other ranks: data and forward pass. No host sync."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Means over the optimizer steps since the last reading, in seconds."""

    step: float = 0.0
    data: float = 0.0
    own: float = 0.0


class StepClock:
    """Measures steps: called at the start of a batch, before its backward pass and at its end.

    On a CUDA device the host runs ahead, so the forward pass is timed there with two events a batch, which are read
    one interval later, when they have completed.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._mark: float | None = None
        self._began: float | None = None
        self._step = self._data = self._forward = 0.0
        self._open: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._events_before: list[tuple[Any, Any]] = []

    def pause(self) -> None:
        """Leave out time that is not training, such as a validation or a checkpoint, until the next batch begins."""
        self._mark = None

    def batch_begins(self, device: Any = None) -> None:
        """Mark that a batch was loaded; on a 'cuda' device events time the forward pass."""
        now = self._now()
        if self._mark is not None:
            self._data += now - self._mark
        self._began = now
        self._open = _event(device)

    def backward_begins(self) -> None:
        """Mark that the loss is computed."""
        if self._began is None:
            return
        if self._open is None:
            self._forward += self._now() - self._began
        else:
            end = _event(self._open[1])
            self._events.append((self._open[0], end[0]))
            self._open = None

    def batch_ends(self) -> None:
        """Mark the end of a batch, from which the next one is waited for."""
        now = self._now()
        started = self._mark if self._mark is not None else self._began
        if started is not None:
            self._step += now - started
        self._mark, self._began = now, None

    def read(self, steps: int) -> StepTimes:
        """Return the means over `steps` optimizer steps, those since the last reading, and reset them."""
        forward = self._forward
        if self._events or self._events_before:
            # Those of this interval may not have run on the device yet.
            forward = sum(a.elapsed_time(b) for a, b in self._events_before if b.query()) / 1e3
            self._events_before, self._events = self._events, []
        count = max(steps, 1)
        times = StepTimes(self._step / count, self._data / count, (self._data + forward) / count)
        self._step = self._data = self._forward = 0.0
        return times


def _event(device: Any) -> Any:
    if getattr(device, "type", None) != "cuda":
        return None
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event, device
