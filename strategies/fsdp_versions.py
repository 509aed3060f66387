"""What torch 2.10 to 2.13 do differently in `fully_shard`, and its private parts that other modules need.

Each difference is looked up by the attribute that has changed, so a build between two releases works too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_state
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.utils._pytree import tree_iter

# Since torch 2.12 hooks see tensors in dataclasses; before it only those in containers that pytree knows.
_SEES_ALL_OUTPUTS = hasattr(_fsdp_state, "collect_grad_tensors")
# Since torch 2.13 a parameter without a gradient can be summed as zeros.
_SUMS_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def apply_fully_shard(module: nn.Module, **options: Any) -> None:
    """Shard a module. In a list, as torch 2.10 and 2.11 refuse a `ModuleList` with a forward pass by itself."""
    fully_shard([module], **options)


def add_missing_hooks(module: Any) -> None:
    """Let a sharded module do in older versions of torch what `fully_shard` does in 2.13."""
    if not _SEES_ALL_OUTPUTS:
        module.register_forward_pre_hook(_gather_again)
        module.register_forward_hook(_watch_other_outputs)
    for group in () if _SUMS_UNUSED else groups_of(module):
        group.reduce_scatter_unused_params = False
        group.post_backward = functools.partial(_post_backward, group, group.post_backward)


def state_of(module: Any) -> Any:
    """What `fully_shard` keeps about a module."""
    return fully_shard.state(module)  # type: ignore[attr-defined]


def groups_of(module: Any) -> list[Any]:
    """The groups of parameters of a module that `fully_shard` was applied to."""
    state = state_of(module)
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    # Before torch 2.12 a module has one group at most.
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _post_backward(group: Any, sum_gradients: Any, *args: Any) -> None:
    """Before torch 2.13: give zeros to parameters without a gradient, so that all ranks sum the same parameters."""
    if group.reduce_scatter_unused_params and group.reduce_grads:
        for each in group.fsdp_params:
            parameter = getattr(each, "_unsharded_param", None)
            if parameter is None or not parameter.requires_grad or each.unsharded_accumulated_grad is not None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    sum_gradients(*args)


def _gather_again(module: nn.Module, _: Any) -> None:
    """Before torch 2.11: a block's second recomputation in a step finds its parameters freed by the first's end."""
    if state_of(module)._training_state != TrainingState.PRE_BACKWARD:
        return
    for group in groups_of(module):
        if not group.is_unsharded:
            group.unshard()
            group.wait_for_unshard()


def _watch_other_outputs(module: nn.Module, _: Any, output: Any) -> None:
    """Before torch 2.12: let the backward pass gather a block's parameters if its output is in a dataclass."""
    state = state_of(module)
    if not torch.is_grad_enabled() or state._training_state == TrainingState.PRE_BACKWARD:
        return
    seen = {id(value) for value in tree_iter(output)}
    for tensor in _tensors_in(output):
        if tensor.requires_grad and id(tensor) not in seen:
            tensor.register_hook(state._pre_backward)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for each in value:
            yield from _tensors_in(each)
