"""The record of a rank in a memory-mapped file, which outlives the rank: what only this rank has, at its last steps.

Two slots: that of the last finished step is not touched while the next one is written, so a rank that is killed while
it writes leaves the one before.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.training.loops.moment import StepMoment

# Batches trained, stage, bytes and CRC of the payload.
_HEADER = struct.Struct("=qqqI")
_SLOTS = 2
_SMALLEST = 1 << 14


@dataclass(frozen=True, slots=True)
class Record:
    """What a rank had after `batches` trained batches; plain values and bytes."""

    batches: int
    moment: StepMoment
    content: Mapping[str, Any]


class RecordWriter:
    """The rank's side.

    Raises:
        OSError: the file cannot be created, or there is no space.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory: mmap.mmap | None = None
        self._capacity = 0
        self._slots: list[tuple[int, StepMoment, bytes] | None] = [None] * _SLOTS
        self._last = 0

    def write(self, batches: int, moment: StepMoment, content: Mapping[str, Any]) -> None:
        """Write what this rank has after `batches` batches; `StepMoment.FORWARD` keeps the step before."""
        payload = pickle.dumps(dict(content), protocol=5)
        final = self._slots[self._last]
        is_same_step = final is not None and final[0] == batches
        slot = self._last if is_same_step else (self._last + 1) % _SLOTS
        self._slots[slot] = (batches, moment, payload)
        if self._memory is None or len(payload) > self._capacity:
            self._grow(len(payload))
        else:
            self._put(self._memory, slot)
        if moment is not StepMoment.FORWARD:
            self._last = slot

    def close(self) -> None:
        """Remove the file."""
        self._memory = None
        self._path.unlink(missing_ok=True)

    def _put(self, memory: mmap.mmap, slot: int) -> None:
        entry = self._slots[slot]
        if entry is None:
            return
        batches, moment, payload = entry
        start = slot * (_HEADER.size + self._capacity)
        # Invalid until its end is written.
        _HEADER.pack_into(memory, start, -1, 0, 0, 0)
        memory[start + _HEADER.size : start + _HEADER.size + len(payload)] = payload
        _HEADER.pack_into(memory, start, batches, moment, len(payload), zlib.crc32(payload))

    def _grow(self, needed: int) -> None:
        self._capacity = max(_SMALLEST, 2 * needed)
        size = _SLOTS * (_HEADER.size + self._capacity)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # Without allocated blocks a full disk ends the process with SIGBUS.
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
        except BaseException:  # raised on
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        for slot in range(_SLOTS):
            self._put(memory, slot)
        temporary.replace(self._path)
        self._memory = memory


def read_records(path: Path) -> tuple[Record, ...]:
    """The valid records of a rank; none if it has not written any, or if they are damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return ()
    capacity = len(data) // _SLOTS - _HEADER.size
    found: list[Record] = []
    for slot in range(_SLOTS if capacity >= 0 else 0):
        start = slot * (_HEADER.size + capacity)
        batches, moment, length, crc = _HEADER.unpack_from(data, start)
        payload = data[start + _HEADER.size : start + _HEADER.size + max(length, 0)]
        if batches < 0 or not 0 < length <= capacity or zlib.crc32(payload) != crc:
            continue
        try:
            found.append(Record(batches, StepMoment(moment), _PlainUnpickler(io.BytesIO(payload)).load()))
        except (pickle.UnpicklingError, ValueError, EOFError, TypeError):
            continue
    return tuple(found)


def find_record(path: Path, batches: int) -> Record | None:
    """A rank's record of this step."""
    return next((record for record in read_records(path) if record.batches == batches), None)


class _PlainUnpickler(pickle.Unpickler):
    """Creates plain values only: no class, so no code."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a plain value")
