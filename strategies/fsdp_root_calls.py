"""Calls of a LightningModule inside its own step, as `self(batch)`, under FSDP2.

The step is the forward pass of the root. torch's hooks would take such a call for another one: at its end they free
the root's parameters, which the rest of the step and the backward pass then gather again.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from typing_extensions import override

from strategies.fsdp_versions import state_of


class StepAsForward(_ForwardRedirection):
    """Runs a step as the forward pass of a sharded module, whose hooks see no call inside of it."""

    def __init__(self, module: nn.Module) -> None:
        self._state = state = state_of(module)
        self._is_step = self._is_inside = False
        # Whether the hooks saw no begin of a call that has not ended.
        self._skipped: list[bool] = []
        module._forward_pre_hooks[state._pre_forward_hook_handle.id] = self._before
        module._forward_hooks[state._post_forward_hook_handle.id] = self._after

    @override
    def __call__(
        self, wrapper_module: nn.Module, original_module: LightningModule, method_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        self._is_step = True
        try:
            return super().__call__(wrapper_module, original_module, method_name, *args, **kwargs)
        finally:
            self._is_step = self._is_inside = False
            self._skipped.clear()

    @override
    def on_after_inner_forward(self, wrapper_module: nn.Module, original_module: LightningModule) -> None:
        self._is_inside = False

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_inside:
            # After a backward pass inside the step the parameters are freed.
            self._skipped.append(self._state._training_state == TrainingState.FORWARD)
            if self._skipped[-1]:
                return args, kwargs
        self._is_inside = self._is_step
        return self._state._pre_forward(module, args, kwargs)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self._is_inside and self._skipped.pop():
            return output
        return self._state._post_forward(module, inputs, output)
