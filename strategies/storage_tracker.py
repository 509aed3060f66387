"""Counts the live bytes of tensor storages, op by op, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from typing_extensions import override

from strategies.step_trace import BlockEvent, GradientArrival


class StorageTracker(TorchDispatchMode):
    """A dispatch mode that tracks which storages created under it are alive, and the peak of their bytes.

    A storage counts once, for any number of views, from the op that creates it until its last reference is dropped.
    Existing storages count when an op returns them, unless they are passed to `ignore`. Gradients are counted
    separately by `count_as_gradient`: a single device frees and recreates them, DDP and ZeRO keep them elsewhere.

    Args:
        granularity: bytes that the device's allocator rounds a storage up to (512 in torch's CUDA caching allocator).

    Attributes:
        peak_activations: maximum of `activations` since `reset_peak`.
        peak_total: maximum of both together since `reset_peak`.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()
        self._granularity = granularity
        self._live: dict[int, tuple[weakref.ref[Any], int, bool]] = {}
        self._ignored: dict[int, weakref.ref[Any]] = {}
        self.activations = 0
        self.gradients = 0
        self.peak_activations = 0
        self.peak_total = 0
        self.course: list[GradientArrival] = []
        self.events: list[BlockEvent] = []
        self._peak_since_gradient = 0
        self._peak_since_event = 0

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._count(out)
        else:
            for leaf in tree_iter(out):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return out

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Exclude the storages of these tensors: parameters, buffers and inputs are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            self._drop(key)
            self._ignored[key] = weakref.ref(storage, lambda _, key=key: self._ignored.pop(key, None))

    def count_as_gradient(self, tensor: Tensor, parameter: int = 0) -> None:
        """Count this tensor's storage as the gradient of the parameter with this index from now on."""
        key = id(tensor.untyped_storage())
        known = self._live.get(key)
        if known is None or known[2]:
            return
        reference, size, _ = known
        self.course.append(self.arrival(parameter))
        self.record("gradient", parameter)
        self._peak_since_gradient = self._peak_since_event = self.activations - size
        self._live[key] = (reference, size, True)
        self.activations -= size
        self.gradients += size

    def reset_peak(self) -> None:
        """Start a new phase: the peaks start from the present values."""
        self.peak_activations = self.activations
        self.peak_total = self.activations + self.gradients
        self._peak_since_gradient = self._peak_since_event = self.activations
        self.course, self.events = [], []

    def arrival(self, parameter: int | None = None) -> GradientArrival:
        """Memory at the moment of a gradient; without a parameter, at the end of the pass."""
        return GradientArrival(self.gradients, self._peak_since_gradient, self.activations, parameter)

    def record(self, kind: str, index: int | None) -> None:
        """Add an event with the memory of activations; see `BlockEvent`."""
        self.events.append(BlockEvent(kind, index, self._peak_since_event, self.activations))
        self._peak_since_event = self.activations

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return  # the indices and values of a sparse tensor are seen as separate tensors
        if tensor.device.type == "meta":
            return  # only a shape; a fake tensor has the device that it represents
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live or key in self._ignored:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        if size == 0:
            return
        self._live[key] = (weakref.ref(storage, lambda _: self._drop(key)), size, False)
        self.activations += size
        self.peak_activations = max(self.peak_activations, self.activations)
        self._peak_since_gradient = max(self._peak_since_gradient, self.activations)
        self._peak_since_event = max(self._peak_since_event, self.activations)
        self.peak_total = max(self.peak_total, self.activations + self.gradients)

    def _drop(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is None:
            return
        if known[2]:
            self.gradients -= known[1]
        else:
            self.activations -= known[1]
