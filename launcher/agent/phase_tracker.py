"""Tracks how long each rank has been in its phase, in seconds during which the agent itself was running."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.process.heartbeat import Heartbeat
from launcher.process.phases import Phase

# A longer time between two looks counts as this many seconds: the agent was stopped too, as by SLURM's suspend.
_LONGEST_GAP = 2.0


@dataclass(frozen=True, slots=True)
class _Seen:
    phase: int
    moves: int
    since: float


class PhaseTracker:
    """Ages of the ranks' phases, and the longest age of each phase so far. `clock` is CLOCK_MONOTONIC in seconds."""

    def __init__(self, clock: float) -> None:
        self._last = clock
        self._awake = 0.0
        self._seen: dict[int, _Seen] = {}
        self._longest: dict[int, float] = {}
        self._ended: dict[int, float] = {}

    def update(self, clock: float, heartbeats: Mapping[int, Heartbeat | None]) -> None:
        """Record the current heartbeats of the running ranks that report phases."""
        self._awake += min(max(clock - self._last, 0.0), _LONGEST_GAP)
        self._last = clock
        reported = {rank: beat for rank, beat in heartbeats.items()
                    if beat is not None and beat.moves > 0 and beat.phase != Phase.ENDED}  # fmt: skip
        for rank in self._seen.keys() - reported.keys():
            del self._seen[rank]
        for rank, beat in reported.items():
            seen = self._seen.get(rank)
            if seen is None or seen.moves != beat.moves:
                if seen is not None:
                    # It ended at some time since the last look.
                    self._ended[rank] = seconds = self._awake - seen.since
                    self._longest[seen.phase] = max(self._longest.get(seen.phase, 0.0), seconds)
                self._seen[rank] = _Seen(beat.phase, beat.moves, self._awake)

    def ages(self) -> dict[int, float]:
        """Seconds that each rank has been in its phase, at least."""
        return {rank: self._awake - seen.since for rank, seen in self._seen.items()}

    def moves(self) -> dict[int, int]:
        """The number of phases that each rank has begun."""
        return {rank: seen.moves for rank, seen in self._seen.items()}

    def phase(self, rank: int) -> int:
        """The phase of a rank with an age."""
        return self._seen[rank].phase

    def longest(self, phase: int) -> float:
        """The longest time in seconds that any rank has been in a phase that has ended."""
        return self._longest.get(phase, 0.0)

    def last_phase_seconds(self, ranks: Iterable[int]) -> float:
        """The longest time in seconds that these ranks were in the phase before their current one."""
        return max((self._ended.get(rank, 0.0) for rank in ranks), default=0.0)
