"""Heartbeat of a rank: a few numbers in a file that the rank writes through memory and its agent reads.

The file also has the rank's phase and, for each phase, the durations of its last occurrences, from which the agent
learns how long it usually takes.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.process.phases import Phase

# step, clock of the last beat, collectives entered, whether the rank writes its stacks on request.
_FORMAT = struct.Struct("=qdqq")
_COLLECTIVES = struct.Struct("=q")
_AT_COLLECTIVES = 16
# Phase, number of phases begun, clock of its begin.
_PHASE = struct.Struct("=qqd")
_AT_PHASE = 32
# For each phase: how often it has ended, and the last durations.
_KEPT = 32
_HISTORY = struct.Struct(f"=q{_KEPT}d")
_AT_HISTORIES = _AT_PHASE + _PHASE.size
_COUNT, _DURATION = struct.Struct("=q"), struct.Struct("=d")
_SIZE = _AT_HISTORIES + len(Phase) * _HISTORY.size
BEFORE_TRAINING = -1
# Of code that does not report its steps.
NO_STEPS = -2
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last heartbeat of a rank.

    Attributes:
        step: optimizer steps done; `BEFORE_TRAINING` until the training starts, `NO_STEPS` if they are not reported.
        clock: CLOCK_MONOTONIC of the last beat, in seconds; the same clock for all processes of a machine.
        collectives: collectives that its process group has entered; `UNKNOWN` without a group.
        phase: number of its `Phase`.
        moves: phases that it has begun; 0 for code that reports none.
    """

    step: int
    clock: float
    collectives: int
    dumps_stacks: bool
    phase: int = Phase.SETUP
    moves: int = 0


class HeartbeatWriter:
    """The rank's side. A beat or a change of phase costs about a microsecond.

    Raises:
        OSError: the file cannot be created, or the disk is full.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Without allocated blocks a full disk ends the process with SIGBUS.
            os.posix_fallocate(descriptor, 0, _SIZE)
            self._memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._clock = clock
        self.step = BEFORE_TRAINING
        self._dumps_stacks = False
        self._collectives = UNKNOWN
        self._phase, self._moves, self._since = int(Phase.SETUP), 0, 0.0
        self._counts = [0] * len(Phase)
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Report that this rank is alive, and how many optimizer steps it has done."""
        if step is not None:
            self.step = step
        _FORMAT.pack_into(self._memory, 0, self.step, self._clock(), self._collectives, self._dumps_stacks)

    def enter_phase(self, phase: int) -> None:
        """Report that a phase begins, which ends the current one; no beat."""
        now, ended, memory = self._clock(), self._phase, self._memory
        count = self._counts[ended]
        if self._moves:
            at = _AT_HISTORIES + ended * _HISTORY.size
            _DURATION.pack_into(memory, at + 8 + count % _KEPT * 8, now - self._since)
            self._counts[ended] = count = count + 1
            _COUNT.pack_into(memory, at, count)
        self._phase, self._since = phase, now
        self._moves = moves = self._moves + 1
        _PHASE.pack_into(memory, _AT_PHASE, phase, moves, now)

    def announce_stack_dumps(self) -> None:
        """Report that this rank writes its stacks on request."""
        self._dumps_stacks = True
        self.beat()

    def set_collectives(self, count: int) -> None:
        """Report how many collectives this rank has entered; no beat, as another thread calls this."""
        self._collectives = count
        _COLLECTIVES.pack_into(self._memory, _AT_COLLECTIVES, count)


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The rank's last heartbeat; None before the first."""
    data = _read(path, _AT_HISTORIES)
    if len(data) < _AT_HISTORIES:
        return None
    step, clock, collectives, dumps_stacks = _FORMAT.unpack_from(data)
    phase, moves, _ = _PHASE.unpack_from(data, _AT_PHASE)
    return Heartbeat(step, clock, collectives, bool(dumps_stacks), phase, moves)


def read_durations(path: Path) -> dict[int, tuple[float, ...]]:
    """The last durations of each phase that has ended, in seconds, in no order; at most 32 for each."""
    data = _read(path, _SIZE)
    found: dict[int, tuple[float, ...]] = {}
    for phase in Phase if len(data) == _SIZE else ():
        count, *durations = _HISTORY.unpack_from(data, _AT_HISTORIES + phase * _HISTORY.size)
        if count > 0:
            found[int(phase)] = tuple(durations[: min(count, _KEPT)])
    return found


def _read(path: Path, size: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)
