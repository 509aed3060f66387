"""Heartbeat of a rank: a few numbers in a file that the rank writes and its agent reads, both memory-mapped."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# step, clock of the last beat, collectives entered, whether the rank writes its stacks on request.
_FORMAT = struct.Struct("=qdqq")
_COLLECTIVES = struct.Struct("=q")
_AT_COLLECTIVES = 16
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
    """

    step: int
    clock: float
    collectives: int
    dumps_stacks: bool


class HeartbeatWriter:
    """The rank's side. A beat costs about a microsecond.

    Raises:
        OSError: the file cannot be created, or the disk is full.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Without allocated blocks a full disk ends the process with SIGBUS.
            os.posix_fallocate(descriptor, 0, _FORMAT.size)
            self._memory = mmap.mmap(descriptor, _FORMAT.size)
        finally:
            os.close(descriptor)
        self._clock = clock
        self.step = BEFORE_TRAINING
        self._dumps_stacks = False
        self._collectives = UNKNOWN
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Report that this rank is alive, and how many optimizer steps it has done."""
        if step is not None:
            self.step = step
        _FORMAT.pack_into(self._memory, 0, self.step, self._clock(), self._collectives, self._dumps_stacks)

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
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < _FORMAT.size:
        return None
    step, clock, collectives, dumps_stacks = _FORMAT.unpack(data[: _FORMAT.size])
    return Heartbeat(step, clock, collectives, bool(dumps_stacks))
