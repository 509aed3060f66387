"""Activation checkpointing: a block's activations are freed after its forward pass, and computed again for backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from strategies.fsdp_blocks import find_blocks


def checkpoint_blocks(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """Checkpoint the blocks that FSDP2 would gather; return them, without those that have nothing to compute again.

    A single layer keeps its input in any case. Names of parameters and state dicts stay.
    """
    blocks = find_checkpointed(model, wrap)
    for block in blocks:
        if not isinstance(vars(block).get("forward"), _Checkpointed):
            block.forward = _Checkpointed(block, block.forward)
    return blocks


def find_checkpointed(model: nn.Module, wrap: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks that can be checkpointed."""
    return [block for block in find_blocks(model, wrap) if wrap or any(True for _ in block.children())]


class _Checkpointed:
    """A block's forward pass that keeps only its inputs."""

    def __init__(self, block: nn.Module, forward: Any) -> None:
        self._block, self._forward = block, forward

    def __reduce__(self) -> Any:
        # A checkpoint with the block among its hyperparameters must not need this class.
        return getattr, (self._block, "forward")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Checkpointed:
        return _Checkpointed(deepcopy(self._block, memo), deepcopy(self._forward, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        kept: list[tuple[dict[str, Any], str, Tensor]] = []
        return self._keep_buffers(kept), _use_buffers(kept)

    @contextmanager
    def _keep_buffers(self, kept: list[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
        """Copy the buffers that the forward pass changes, such as the statistics of a batch norm."""
        before = [
            (module, name, value, value._version, value.clone())
            for module in self._block.modules()
            if module.training
            for name, value in module._buffers.items()
            if value is not None
        ]
        yield
        for module, name, value, version, copy in before:
            # torch changes the statistics of norms without a new version.
            changed = isinstance(module, _NormBase) or module._buffers.get(name) is not value
            if changed or value._version != version:
                kept.append((module._buffers, name, copy))


@contextmanager
def _use_buffers(kept: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Compute with the buffers of the first time, and do not change them a second time."""
    current = [(buffers, name, buffers[name]) for buffers, name, _ in kept]
    for buffers, name, copy in kept:
        buffers[name] = copy
    try:
        yield
    finally:
        for buffers, name, value in current:
            buffers[name] = value
