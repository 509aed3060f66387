"""Peak memory of a training step from torch's CPU allocator, independent of the launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile, record_function

T = TypeVar("T")
_MARK = "the step that is measured"


def peak_of(prepare: Callable[[], T], step: Callable[[T], object]) -> int:
    """Peak bytes allocated by torch's CPU allocator during `step`.

    Allocate everything that `step` uses in `prepare`: the profiler does not see releases of memory that was allocated
    before it started.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        prepared = prepare()
        with record_function(_MARK):
            step(prepared)
    assert watched.profiler is not None
    events = list(watched.profiler.kineto_results.events())
    begin = min(event.start_ns() for event in events if event.name() == _MARK)
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"), key=lambda c: c[0]
    )
    now = peak = 0
    for time, size in changes:
        now += size
        if time >= begin:
            peak = max(peak, now)
    return peak
