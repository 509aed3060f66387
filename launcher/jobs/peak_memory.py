"""What "peak memory" of a run is, for every screen, page and file: one reader of the events decides. Pure.

On a GPU it is the most bytes that torch's allocator gave to tensors; the memory that the allocator reserves, and that
`nvidia-smi` shows, is more. On a CPU it is the resident memory of a rank's process, with Python and all libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALLOCATED = "allocated by torch on the device; it reserves more"
RESIDENT = "resident memory of the process (RSS)"


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The peak of each rank in bytes, over all attempts, and of `what`; empty if not recorded."""

    by_rank: Mapping[int, int]
    what: str

    @property
    def highest(self) -> int | None:
        """That of the rank with the most; None if it was not recorded."""
        return max(self.by_rank.values(), default=None)


class PeakMemoryReader:
    """Collects the peaks from the events of a run."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._is_gpu = True
        self._newest: Mapping[str, Any] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        """Add one event, in the order of the file."""
        kind = event.get("kind")
        if kind == "planned":
            plan = event.get("plan")
            self._is_gpu = not isinstance(plan, Mapping) or plan.get("device_kind") in ("cuda", None)
        elif kind == "ranks":
            # A sample has the peak so far, so the newest one of an attempt counts; a long run has 100,000 of them.
            self._newest = event
        elif kind == "run_started":
            self._add_newest()
        elif kind == "memory" and self._is_gpu:
            # On a CPU this is how much the memory grew, for the comparison with the plan.
            self._add(event.get("ranks"), event.get("measured"))

    def _add_newest(self) -> None:
        self._add(self._newest.get("ranks"), self._newest.get("peak_memory"))
        self._newest = {}

    def _add(self, ranks: Any, peaks: Any) -> None:
        if not isinstance(ranks, list) or not isinstance(peaks, list):
            return
        for rank, peak in zip(ranks, peaks, strict=False):
            if type(rank) is int and type(peak) is int and 0 < peak < 2**53:
                self._peaks[rank] = max(peak, self._peaks.get(rank, 0))

    def find_peak(self) -> PeakMemory:
        """The peaks so far."""
        self._add_newest()
        return PeakMemory(dict(sorted(self._peaks.items())), ALLOCATED if self._is_gpu else RESIDENT)
