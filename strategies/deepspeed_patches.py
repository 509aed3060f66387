"""Corrections to DeepSpeed: batch norms, the order of modules in stage 3, and state that it keeps for a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from strategies.base import StrategyError


def compute_with_fp32_weights(module: nn.Module) -> int:
    """Make batch and instance norms with fp32 running statistics compute with fp32 weights; return how many there are.

    DeepSpeed casts parameters and, since 0.19, leaves buffers as they are (`_cast_module_mixed_precision`). torch's
    batch norm accepts a 16-bit input with fp32 weights and statistics, as under autocast, but no mixture of the two;
    torch 2.10's instance norm neither.
    16-bit statistics would not help: bf16 loses the small steps of a running mean, fp16 overflows at 65,504.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    mixed = [n for n in norms if n.weight is not None and n.running_mean is not None
             and n.weight.dtype != n.running_mean.dtype]  # fmt: skip
    for layer in mixed:
        # A bound method could not be pickled.
        layer.forward = partial(_forward, layer)
    return len(mixed)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return type(layer).forward(_Fp32View(layer), *args, **kwargs)


class _Fp32View:
    """A view of a norm with fp32 weights, for the forward code of its class."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        # Differentiable copies: autograd casts their gradients back to the type of the parameters.
        self.weight = layer.weight.float()
        self.bias = None if layer.bias is None else layer.bias.float()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._layer, name)
        is_method = isinstance(found, MethodType) and found.__self__ is self._layer
        return MethodType(found.__func__, self) if is_method else found


class OutermostCall:
    """Hooks for a module that calls itself: `begin` is called before the outermost call only, as a forward pre-hook."""

    def __init__(self, begin: Callable[..., Any]) -> None:
        self._begin = begin
        self._depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """Run before each call."""
        if self._depth == 0:
            self._begin(module, args)
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Run after each call, also one that raised an error."""
        self._depth = max(0, self._depth - 1)


def keep_module_order(engine: Any) -> RemovableHandle | None:
    """Make an engine of stage 3 begin a step where Lightning calls the module, not where the module calls itself.

    DeepSpeed records the modules of one step, and prefetches parameters by that record in later steps. For DeepSpeed a
    step begins where its root module is called. Lightning calls the module to run `training_step`, which may call it
    again as `self(batch)`. DeepSpeed then sees a step without modules, discards the record in every step, and gathers
    each parameter only when it is needed.

    Returns:
        A handle that removes the added hook; None if none was added.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    handle = getattr(offload, "fwd_pre_hook", None)
    if offload is None or handle is None:
        return None
    module: nn.Module = offload.module
    call = OutermostCall(module._forward_pre_hooks[handle.id])
    # Under the same id, so that DeepSpeed's handle removes it.
    module._forward_pre_hooks[handle.id] = call.enter
    return module.register_forward_hook(call.leave, always_call=True)


def reset_process_groups() -> None:
    """Make DeepSpeed use the current process group: it keeps the first one of a process, even a destroyed one."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups._release_process_group_references(group=None)


def use_cpu_accelerator(pretend_fp16: bool) -> None:
    """Import DeepSpeed for CPUs. It selects one kind of device at import, and prefers a GPU.

    Raises:
        StrategyError: it was already imported for another kind of device.
    """
    if "deepspeed" not in sys.modules:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        raise StrategyError(
            f"DeepSpeed was already imported in this process for {accelerator.device_name()} and cannot train on a "
            "CPU; set DS_ACCELERATOR=cpu before the first import, or use `accelerator: gpu`"
        )
    # Its all-reduce over shared memory would be compiled first, and a killed rank leaves the lock of that behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if pretend_fp16:
        accelerator.is_fp16_supported = lambda: True
