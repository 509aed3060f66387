"""ZeRO 3's record of the order in which modules run, kept from step to step under Lightning.

DeepSpeed records the modules of a step once, and gathers parameters ahead by it in all later ones. It begins a step
where its root module is called. Lightning calls the module twice: once itself, to run `training_step`, and once where
that calls `self(batch)`. So a step seems to end after no module at all, the record is thrown away in each, and every
parameter is gathered when it is needed, forward and backward, with the ranks waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class OutermostCall:
    """Hooks for a module that calls itself: they tell of the outermost call alone.

    Args:
        begin: what is to be done where that begins; takes the module and its arguments.
    """

    def __init__(self, begin: Callable[..., Any]) -> None:
        self._begin = begin
        self._depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before each call."""
        if self._depth == 0:
            self._begin(module, args)
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After each call, whether it raised or not."""
        self._depth = max(0, self._depth - 1)


def keep_module_order(engine: Any) -> RemovableHandle | None:
    """Let an engine of stage 3 begin a step where Lightning calls the module, not where the module calls itself.

    Args:
        engine: a `DeepSpeedEngine` of any stage; others have nothing to keep.

    Returns:
        Removes what it leaves on the module beside DeepSpeed's own hook; None if it leaves nothing.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    handle = getattr(offload, "fwd_pre_hook", None)
    if offload is None or handle is None:
        return None
    module: nn.Module = offload.module
    call = OutermostCall(module._forward_pre_hooks[handle.id])
    # In its place, so that DeepSpeed's own handle removes it.
    module._forward_pre_hooks[handle.id] = call.enter
    return module.register_forward_hook(call.leave, always_call=True)
