"""What only this rank has: random states, accumulated metrics and changed buffers, as plain values for its record."""

from __future__ import annotations

import _random
import ctypes
import random
import struct
import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from launcher.checkpoint import rng_state
from launcher.training.resume import random_states
from launcher.training.resume.epoch_metrics import KEY as METRICS_KEY
from launcher.training.resume.epoch_metrics import EpochMetrics, state_of_logged

# The keys of a record's content; the first two are those of a checkpoint, which has them for all ranks.
RANDOM, METRICS, BUFFERS = random_states.KEY, METRICS_KEY, "buffers"
_TENSOR, _SCALAR = "\0tensor", "\0scalar"
# Types of which a Python number has every value.
_EXACT = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64", torch.int32: "int32"}
# Bytes of a buffer that is recorded even if it seems constant.
_SMALL = 4096
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


class OwnState:
    """Reads what only this rank has; the module is the one that is trained."""

    def __init__(self, trainer: pl.Trainer, metrics: EpochMetrics) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._metrics = metrics
        self._random = RandomReader()
        self._versions = {name: buffer._version for name, buffer in self._module.named_buffers()}
        # What does not change of each logged value.
        self._described: dict[str, tuple[Any, dict[str, Any]]] = {}
        # By type: names, places and flat views of buffers that are recorded always.
        self._changing: dict[torch.dtype, tuple[list[Any], list[Any], list[Any]]] = {}
        self._others: list[tuple[str, Mapping[str, Tensor | None], str, int | None]] = []
        self.find_buffers()

    def find_buffers(self) -> None:
        """Find the module's buffers, which may have been added or replaced."""
        self._changing.clear()
        self._others = []
        for owner, part in self._module.named_modules():
            for name, buffer in part._buffers.items():
                if buffer is None:
                    continue
                full = f"{owner}.{name}" if owner else name
                constant = self._constant_version(full, part, buffer)
                if constant is None and buffer.is_contiguous():
                    group = self._changing.setdefault(buffer.dtype, ([], [], []))
                    for values, value in zip(
                        group, (full, (part._buffers, name, buffer), buffer.view(-1)), strict=True
                    ):
                        values.append(value)
                else:
                    self._others.append((full, part._buffers, name, constant))

    def _constant_version(self, name: str, part: nn.Module, buffer: Tensor) -> int | None:
        """The version at which a buffer is as a new process creates it, as a mask; None if it is recorded always.

        torch does not count all changes of statistics.
        """
        if isinstance(part, _NormBase) or buffer.nbytes <= _SMALL:
            return None
        return self._versions.get(name, -1)

    def read(self) -> dict[str, Any]:
        """The content of a record."""
        return {RANDOM: self._random.read(), METRICS: self._read_metrics(), BUFFERS: self._read_buffers()}

    def _read_buffers(self) -> list[tuple[list[str], Any]]:
        """Names, and one tensor with the numbers of these buffers."""
        if not all(
            owner.get(key) is buffer for _, places, _ in self._changing.values() for owner, key, buffer in places
        ):
            self.find_buffers()
        found = [(names, pack(torch.cat(views))) for names, _, views in self._changing.values()]
        for name, owner, key, constant in self._others:
            buffer = owner.get(key)
            if buffer is not None and buffer._version != constant:
                found.append(([name], pack(buffer.reshape(-1))))
        return found

    def _read_metrics(self) -> dict[str, Any]:
        if self._metrics.has_ended or self._metrics.made:
            return pack(self._metrics.own_state(self._trainer, self._module))
        results = self._trainer.fit_loop.epoch_loop._results
        logged = {key: self._pack_logged(key, metric) for key, metric in results.items()
                  if metric.meta.on_epoch and not metric.has_reset}  # fmt: skip
        return {"logged": logged, "own": {}, "kept": None}

    def _pack_logged(self, key: str, metric: Any) -> dict[str, Any]:
        known = self._described.get(key)
        if known is None or known[0] is not metric:
            described = {name: value for name, value in state_of_logged(metric).items() if name != "state"}
            known = self._described[key] = (metric, pack(described))
        return {**known[1], "state": pack(metric.metric_state) if metric.is_tensor else None}


class RandomReader:
    """The packed states of the generators; those of Python and NumPy are read again only if they have changed."""

    def __init__(self) -> None:
        self._python: Any = None
        self._numpy: Any = None
        self._packed: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """What `launcher.checkpoint.rng_state.capture` returns, packed."""
        python, numpy = _python_state(), _numpy_state()
        is_same = numpy is not None and (python, numpy) == (self._python, self._numpy)
        # NumPy keeps a second normal number outside of this memory.
        if not is_same or self._packed["numpy"]["has_gauss"]:
            self._python, self._numpy = python, numpy
            self._packed = pack(rng_state.capture())
            return self._packed
        return {**self._packed, **{name: _pack_bytes(state) for name, state in rng_state.capture_torch().items()}}


def _python_state() -> Any:
    """Python's generator as a value to compare: its memory, a position and 624 numbers, where it lies as expected."""
    own: Any = random.getstate.__self__  # type: ignore[attr-defined]
    if not _HAS_KNOWN_LAYOUT:
        return random.getstate()
    return ctypes.string_at(id(own) + object.__basicsize__, _NUMBERS.size), own.gauss_next


def _has_known_layout() -> bool:
    own: Any = random.getstate.__self__  # type: ignore[attr-defined]
    if sys.implementation.name != "cpython" or not object.__basicsize__ + _NUMBERS.size <= _random.Random.__basicsize__:
        return False
    position, *numbers = _NUMBERS.unpack(ctypes.string_at(id(own) + object.__basicsize__, _NUMBERS.size))
    return random.getstate()[1] == (*numbers, position)


_NUMBERS = struct.Struct("=625I")
_HAS_KNOWN_LAYOUT = _has_known_layout()


def _numpy_state() -> bytes | None:
    """The memory of NumPy's generator, 624 numbers and a position, which is faster to read than its state.

    None for another generator than NumPy's own.
    """
    generator: Any = np.random.mtrand._rand._bit_generator
    own = type(generator) is np.random.MT19937
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4) if own else None


def restore_buffers(module: nn.Module, content: Mapping[str, Any]) -> None:
    """Set the buffers to the values in a record's content; other buffers keep theirs."""
    own = dict(module.named_buffers())
    with torch.no_grad():
        for names, packed in content[BUFFERS]:
            if not {*names} <= own.keys():
                continue  # the module of another class
            values = unpack(packed).split([own[name].numel() for name in names])
            for name, value in zip(names, values, strict=True):
                own[name].copy_(value.reshape(own[name].shape))


def pack(value: Any) -> Any:
    """Plain values and bytes for a value with tensors."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict or isinstance(value, Mapping):
        return {key: each if type(each) in _PLAIN else pack(each) for key, each in value.items()}
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.dtype in _EXACT:
            return {_SCALAR: (_EXACT[value.dtype], value.item())}
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return {_TENSOR: (str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.numpy().tobytes())}
    if isinstance(value, list | tuple):
        return [pack(each) for each in value] if isinstance(value, list) else tuple(map(pack, value))
    return value


def _pack_bytes(state: Tensor) -> dict[str, Any]:
    """As `pack`, for the state of a generator."""
    return {_TENSOR: ("uint8", tuple(state.shape), state.numpy().tobytes())}


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, dict):
        if _SCALAR in value:
            name, number = value[_SCALAR]
            return torch.tensor(number, dtype=getattr(torch, name))
        if _TENSOR not in value:
            return {key: unpack(each) for key, each in value.items()}
        name, shape, data = value[_TENSOR]
        dtype = getattr(torch, name)
        return (
            torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        )
    if isinstance(value, list):
        return [unpack(each) for each in value]
    if isinstance(value, tuple):
        return tuple(unpack(each) for each in value)
    return value
