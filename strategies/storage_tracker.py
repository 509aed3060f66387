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

from strategies.step_trace import GradientArrival


class StorageTracker(TorchDispatchMode):
    """A dispatch mode that knows which storages made under it are alive, and the most bytes that were alive at once.

    A storage is counted once, however many views it has, from the op that made it until its last reference is gone.
    Storages that exist already are `ignore`d or they are counted when an op returns them. Gradients are told apart
    with `count_as_gradient`: a single device frees and regrows them, DDP and ZeRO keep them elsewhere.

    Args:
        granularity: bytes that the device's allocator rounds a storage up to (512 in torch's CUDA caching allocator).

    Attributes:
        activations: live bytes that are not gradients.
        gradients: live bytes of gradients.
        peak_activations: the most of the first since `reset_peak`.
        peak_total: the most of both together since `reset_peak`.
        course: what each gradient found when it was counted.
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
        self._peak_since_gradient = 0

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out)
        else:
            for leaf in tree_iter(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return out

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave these tensors' storages out: parameters, buffers and inputs are counted elsewhere."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            self._drop(key)
            self._ignored[key] = weakref.ref(storage, lambda _, key=key: self._ignored.pop(key, None))

    def count_as_gradient(self, tensor: Tensor, parameter: int = 0) -> None:
        """From now on this tensor's storage is a gradient's: that of the parameter with this number."""
        key = id(tensor.untyped_storage())
        known = self._live.get(key)
        if known is None or known[2]:
            return
        reference, size, _ = known
        self.course.append(self.landing(parameter))
        self._peak_since_gradient = self.activations - size
        self._live[key] = (reference, size, True)
        self.activations -= size
        self.gradients += size

    def reset_peak(self) -> None:
        """Begin a new phase: the peaks start from what is alive now."""
        self.peak_activations = self.activations
        self.peak_total = self.activations + self.gradients
        self._peak_since_gradient = self.activations
        self.course = []

    def landing(self, parameter: int | None = None) -> GradientArrival:
        """What a gradient finds that is counted now; without a parameter, what the end of the pass finds."""
        return GradientArrival(self.gradients, self._peak_since_gradient, self.activations, parameter)

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return  # a sparse tensor's indices and values come by as tensors of their own
        if tensor.device.type == "meta":
            return  # a shape alone; a fake tensor has the device that it stands for
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
        self.peak_total = max(self.peak_total, self.activations + self.gradients)

    def _drop(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is None:
            return
        if known[2]:
            self.gradients -= known[1]
        else:
            self.activations -= known[1]
