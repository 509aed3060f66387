"""Gradients that a step computes by itself under FSDP2, as for a gradient penalty or the forces of a potential.

torch's hooks take each backward pass for the last one: they free parameters and sum gradients. `torch.autograd.grad`
needs neither. If it creates a graph (`create_graph=True`), a later backward pass needs the same parameters again, and
reads freed memory without them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from strategies.base import StrategyError

# Those of the model whose step began last: another one may exist for as long as the garbage collector of a rank likes.
_CURRENT: list[weakref.ref[InnerGradients]] = []


class InnerGradients:
    """Keeps torch's hooks of a sharded module from ending a step whose gradients are computed inside of it."""

    def __init__(self, states: Sequence[tuple[Any, Sequence[Any]]]) -> None:
        self._groups = [group for _, groups in states for group in groups]
        self._calls = 0
        self._has_graph = self._keeps = False
        self._reached: list[tuple[Any, Any]] = []
        self._gathered: list[Any] = []
        for state, groups in states:
            state._pre_backward = functools.partial(self._pre_backward, state, groups, state._pre_backward)
        for group in self._groups:
            group.reshard = functools.partial(self._reshard, group.reshard)
            group.post_backward = functools.partial(self._post_backward, group.post_backward)
        _watch_engine()

    def begin_step(self) -> None:
        """Forget the gradients of earlier steps, and free what they kept."""
        _CURRENT[:] = [weakref.ref(self)]
        self._has_graph = False
        self.free()

    def free(self) -> None:
        """Free parameters that were kept for another backward pass."""
        if self._keeps:
            self._keeps = False
            for group in self._groups:
                group.reshard()

    def before_pass(self, *, is_call: bool) -> None:
        """Gather all parameters that a graph of gradients may need; `is_call`: the pass is one of `autograd.grad`."""
        self._calls += is_call
        if self._has_graph:
            self._keeps = True
            for group in self._groups:
                group.unshard()
                group.wait_for_unshard()

    def after_pass(self, *, is_call: bool) -> None:
        """See `before_pass`."""
        self._calls -= is_call
        if self._calls:
            return
        if not is_call:
            self.free()
            return
        for state, before in self._reached:
            state._training_state = before
        for group in self._gathered if not self._keeps else ():
            group.reshard()
        self._reached, self._gathered = [], []

    def _pre_backward(self, state: Any, groups: Sequence[Any], original: Any, gradient: Tensor) -> Tensor:
        has_graph = torch.is_grad_enabled()
        if not self._calls:
            if has_graph:
                raise StrategyError(
                    "a backward pass with create_graph=True is impossible under FSDP2, which frees the weights in it; "
                    "compute gradients by `torch.autograd.grad(..., create_graph=True)`, or use `strategy: ddp`"
                )
            return original(gradient)
        self._has_graph, self._keeps = self._has_graph or has_graph, self._keeps or has_graph
        if state._training_state != TrainingState.PRE_BACKWARD:
            # A block that is computed again then stays gathered.
            self._reached.append((state, state._training_state))
            state._training_state = TrainingState.PRE_BACKWARD
        for group in groups:
            if not group.is_unsharded:
                self._gathered.append(group)
                group.unshard()
                group.wait_for_unshard()
        return gradient

    def _reshard(self, original: Any) -> None:
        if not self._keeps:
            original()

    def _post_backward(self, original: Any, *unused: Any) -> None:
        if not self._calls:
            original(*unused)


@functools.cache
def _watch_engine() -> None:
    """Let `InnerGradients` know where each pass of autograd begins and ends, in this process."""
    run = torch.autograd._engine_run_backward

    @functools.wraps(run)
    def watched(*args: Any, **kwargs: Any) -> Any:
        current, is_call = _CURRENT[0]() if _CURRENT else None, not kwargs.get("accumulate_grad")
        if current is None:
            return run(*args, **kwargs)
        current.before_pass(is_call=is_call)
        try:
            return run(*args, **kwargs)
        finally:
            current.after_pass(is_call=is_call)

    torch.autograd._engine_run_backward = watched  # type: ignore[attr-defined]
