"""Heartbeat of a rank: a few numbers in a file that the rank writes through memory and its agent reads.

The file also has the rank's phase and, for each phase, the durations of its last occurrences, from which the agent
learns how long it usually takes.
"""

from __future__ import annotations

import contextlib
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
# For each phase: its last durations; 0 where it has ended less often.
_KEPT = 32
_HISTORY = struct.Struct(f"={_KEPT}d")
_DURATION = struct.Struct("=d")
_HISTORIES = tuple(_AT_PHASE + _PHASE.size + number * _HISTORY.size for number in range(len(Phase)))
_SIZE = _HISTORIES[-1] + _HISTORY.size
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
        now, ended, moves, memory = self._clock(), self._phase, self._moves, self._memory
        if moves:
            count = self._counts[ended]
            self._counts[ended] = count + 1
            _DURATION.pack_into(memory, _HISTORIES[ended] + count % _KEPT * 8, now - self._since)
        self._phase, self._since, self._moves = phase, now, moves + 1
        _PHASE.pack_into(memory, _AT_PHASE, phase, moves + 1, now)

    def announce_stack_dumps(self) -> None:
        """Report that this rank writes its stacks on request."""
        self._dumps_stacks = True
        self.beat()

    def set_collectives(self, count: int) -> None:
        """Report how many collectives this rank has entered; no beat, as another thread calls this."""
        self._collectives = count
        _COLLECTIVES.pack_into(self._memory, _AT_COLLECTIVES, count)


class HeartbeatReader:
    """The agent's side, of one rank. A reading costs a few microseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory: mmap.mmap | None = None

    def read(self) -> Heartbeat | None:
        """The rank's last heartbeat; None before the first."""
        memory = self._open()
        if memory is None:
            return None
        step, clock, collectives, dumps_stacks = _FORMAT.unpack_from(memory)
        phase, moves, _ = _PHASE.unpack_from(memory, _AT_PHASE)
        return Heartbeat(step, clock, collectives, bool(dumps_stacks), phase, moves) if clock else None

    def read_durations(self, phase: int) -> tuple[float, ...]:
        """The last durations of a phase, in seconds, in no order; at most 32."""
        memory = self._open()
        durations = () if memory is None else _HISTORY.unpack_from(memory, _HISTORIES[phase])
        return tuple(seconds for seconds in durations if seconds > 0)

    def _open(self) -> mmap.mmap | None:
        # The rank creates the file once, and then gives it its size.
        if self._memory is None:
            with contextlib.suppress(OSError, ValueError), self._path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)
        return self._memory


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The rank's last heartbeat; None before the first."""
    return HeartbeatReader(path).read()
