"""What only this rank has: random states, accumulated metrics and changed buffers, as plain values for its record."""

from __future__ import annotations

import ctypes
import random
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
from launcher.training.resume.epoch_metrics import EpochMetrics

# The keys of a record's content; the first two are those of a checkpoint, which has them for all ranks.
RANDOM, METRICS, BUFFERS = random_states.KEY, METRICS_KEY, "buffers"
_TENSOR = "\0tensor"
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
        # Constant buffers, such as masks, are the same in a new process. torch does not count changes of statistics.
        statistics = {name for name, part in self._module.named_modules() if isinstance(part, _NormBase)}
        self._versions = {name: buffer._version for name, buffer in self._module.named_buffers()
                          if buffer.nbytes > _SMALL and name.rpartition(".")[0] not in statistics}  # fmt: skip

    def read(self) -> dict[str, Any]:
        """The content of a record."""
        return {
            RANDOM: self._random.read(),
            METRICS: pack(self._metrics.own_state(self._trainer, self._module)),
            BUFFERS: {name: pack(buffer) for name, buffer in self._module.named_buffers()
                      if buffer._version != self._versions.get(name)},
        }  # fmt: skip


class RandomReader:
    """The packed states of the generators; those of Python and NumPy are read again only if they have changed."""

    def __init__(self) -> None:
        self._python: Any = None
        self._numpy: Any = None
        self._packed: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """What `launcher.checkpoint.rng_state.capture` returns, packed."""
        python, numpy = random.getstate(), _numpy_state()
        is_same = numpy is not None and (python, numpy) == (self._python, self._numpy)
        # NumPy keeps a second normal number outside of this memory.
        if not is_same or self._packed["numpy"]["has_gauss"]:
            self._python, self._numpy = python, numpy
            self._packed = pack(rng_state.capture())
            return self._packed
        return {**self._packed, **pack(rng_state.capture_torch())}


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
        for name, packed in content[BUFFERS].items():
            if name in own:
                own[name].copy_(unpack(packed))


def pack(value: Any) -> Any:
    """Plain values and bytes for a value with tensors."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict or isinstance(value, Mapping):
        return {key: each if type(each) in _PLAIN else pack(each) for key, each in value.items()}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return {_TENSOR: (str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.numpy().tobytes())}
    if isinstance(value, list | tuple):
        return [pack(each) for each in value] if isinstance(value, list) else tuple(map(pack, value))
    return value


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, dict):
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
