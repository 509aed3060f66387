"""Reports when a training step enters and leaves each block of a model, in both passes, as FSDP2's hooks see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

_MARKS = "_launcher_block_marks"


class BlockHooks:
    """Hooks on the blocks of a model, for one step.

    FSDP2 gathers a block before its forward pass and when the gradient of an output is known, and reduces its gradients
    when those of its inputs are known. No tensor is added to the graph.

    Args:
        record: called with the kind of the event (see `BlockEvent`) and the number of the block.

    Attributes:
        is_backward: set it before the backward pass: blocks that are computed again there are not entered.
    """

    def __init__(self, blocks: Sequence[nn.Module], record: Callable[[str, int], None]) -> None:
        self._record = record
        self.is_backward = False
        self._handles: list[Any] = []
        for number, block in enumerate(blocks):
            self._handles += [
                block.register_forward_pre_hook(self._enter(number, block), prepend=True, with_kwargs=True),
                block.register_forward_hook(self._leave(number)),
            ]

    def remove(self) -> None:
        """Remove the hooks from the blocks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, number: int, block: nn.Module) -> Callable[..., None]:
        trained = [p for p in block.parameters() if p.requires_grad]

        def enter(_: nn.Module, arguments: Any, options: Any) -> None:
            if self.is_backward:
                return
            self._record("enter", number)
            tensors = _find_differentiable((arguments, options))
            left = len(tensors)

            def complete() -> None:
                nonlocal left
                left -= 1
                # Another input, such as an encoder's output, may get gradients from more blocks.
                if left == 0 or (left > 0 and all(p.grad is not None for p in trained)):
                    left = 0
                    self._record("inputs", number)

            for tensor in tensors:
                _on_gradient(tensor, complete)

        return enter

    def _leave(self, number: int) -> Callable[..., None]:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            if self.is_backward:
                return
            self._record("leave", number)
            for tensor in _find_differentiable(output):
                _on_gradient(tensor, lambda: self._record("outputs", number))

        return leave


def _find_differentiable(values: Any) -> list[Tensor]:
    if not torch.is_grad_enabled():
        return []
    found = {id(leaf): leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor) and leaf.requires_grad}
    return list(found.values())


def _on_gradient(tensor: Tensor, mark: Callable[[], None]) -> None:
    """Call `mark` when the tensor's gradient is known: of several, the last one first, as the graph runs backward."""
    marks: list[Callable[[], None]] | None = getattr(tensor, _MARKS, None)
    if marks is not None:
        marks.append(mark)
        return
    marks = [mark]
    setattr(tensor, _MARKS, marks)

    def run(_: Tensor) -> None:
        for each in reversed(marks):
            each()

    tensor.register_hook(run)
