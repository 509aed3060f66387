"""The states of the callbacks as of the last step, where hooks of the next step or of a validation may change them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch import Callback
from torch import Tensor

# Hooks that run between the end of a step and the sum of the next step's gradients.
_BEFORE_GRADIENTS = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward")
# Bytes of tensors that are copied at each step.
_COPIED_AT_MOST = 1 << 20


class CallbackStates:
    """Copies the states of callbacks that may have changed when a later failure is handled.

    Attributes:
        problem: why the states of the last step are not known; None if they are.
    """

    def __init__(self) -> None:
        self._each_step: list[Callback] = []
        self._kept: dict[str, Any] = {}
        self.problem: str | None = None

    def watch(self, trainer: pl.Trainer) -> None:
        """Find the callbacks whose states change between two steps."""
        hooks = _BEFORE_GRADIENTS
        if trainer.accumulate_grad_batches > 1:
            hooks = (*hooks, "on_train_batch_end")
        self._each_step = [each for each in _with_state(trainer) if _overrides(each, hooks)]

    def keep(self, trainer: pl.Trainer, *, is_step: bool, is_within_step: bool = False) -> None:
        """Copy the states; after a step only those that change before the next one, otherwise all.

        `is_within_step`: between two micro batches, so copies from the step's start stay.
        """
        callbacks = self._each_step if is_step else _with_state(trainer)
        if is_within_step:
            callbacks = [each for each in callbacks if each.state_key not in self._kept]
        else:
            self._kept = {}
        for callback in callbacks:
            state = callback.state_dict()
            if is_step and count_tensor_bytes(state) > _COPIED_AT_MOST:
                self.problem = f"{type(callback).__qualname__} changes a large state between two steps"
                self._each_step = []
                return
            self._kept[callback.state_key] = copy.deepcopy(state)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Replace the states in a checkpoint by the copies."""
        states: dict[str, Any] = checkpoint.get("callbacks", {})
        states.update({key: state for key, state in self._kept.items() if key in states})


def _overrides(callback: Callback, hooks: Sequence[str]) -> bool:
    return any(getattr(type(callback), name) is not getattr(Callback, name) for name in hooks)


def _with_state(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return [each for each in callbacks if type(each).state_dict is not Callback.state_dict]


def count_tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(count_tensor_bytes, value.values()))
    return sum(map(count_tensor_bytes, value)) if isinstance(value, list | tuple) else 0
