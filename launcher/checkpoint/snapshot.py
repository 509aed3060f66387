"""A checkpoint as `torch.save` would write it at this moment, kept in host memory until it is written."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The parts of `torch.save` before and after the file is opened: their records are those of its file, byte by byte.
from torch.serialization import DEFAULT_PROTOCOL, _open_zipfile_writer, _save

from launcher.hardware.devices import host_memory
from launcher.hardware.host_memory import available_memory
from strategies.units import format_bytes

# Smaller tensors are copied into new memory.
_REUSED_FROM = 1 << 16
_LEFT_FREE = 0.1  # share of the host's memory


class HostMemoryError(Exception):
    """The host has too little free memory for a copy of the state; the message has both sizes."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The records of a file, in their order: name, content (bytes, text or a storage) and size in bytes."""

    records: Sequence[tuple[str, Any, int]]

    def write(self, file: Any) -> None:
        """Write what `torch.save` would have written, to an object with `write` and `flush`."""
        opened: Any = _open_zipfile_writer(file)
        with opened as archive:
            for name, content, size in self.records:
                archive.write_record(name, content, size)


class SnapshotMemory:
    """Copies checkpoints into host memory that is used again: fresh pages cost several times the copy.

    It holds one copy of the state, so a snapshot is valid until the next one is taken.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, content: Any) -> Snapshot:
        """Pickle all objects of a checkpoint now, and copy the tensors' storages.

        Raises:
            HostMemoryError: the copy would leave less than a tenth of the host's memory; nothing is copied.
            Exception: any that `torch.save` raises for an object that cannot be pickled.
        """
        recorder = _Recorder()
        _save(content, recorder, pickle, DEFAULT_PROTOCOL, False)
        large = {name: size for name, part, size in recorder.records if _is_storage(part) and size >= _REUSED_FROM}
        before, self._buffers = self._buffers, {}
        kept = {name: before[name] for name, size in large.items() if name in before and before[name].numel() == size}
        del before  # frees the buffers of other sizes
        _check_memory(sum(size for name, size in large.items() if name not in kept))
        self._buffers = {name: kept[name] if name in kept else _allocate(size) for name, size in large.items()}
        return Snapshot([(name, self._copy(name, part, size), size) for name, part, size in recorder.records])

    def _copy(self, name: str, part: Any, size: int) -> Any:
        if not _is_storage(part):
            return part
        buffer = self._buffers[name] if name in self._buffers else _allocate(size)
        return buffer.copy_(_allocate(0).set_(part)).untyped_storage()


class _Recorder:
    """Takes the place of the archive."""

    def __init__(self) -> None:
        self.records: list[tuple[str, Any, int]] = []

    def write_record(self, name: str, content: Any, size: int) -> None:
        self.records.append((name, content, size))


def _is_storage(part: Any) -> bool:
    return isinstance(part, torch.UntypedStorage)


def _allocate(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _check_memory(needed: int) -> None:
    available = available_memory()
    if needed and available is not None and needed + _LEFT_FREE * host_memory() > available:
        raise HostMemoryError(f"{format_bytes(needed)} needed, {format_bytes(available)} free")
