"""What a step under FSDP2 needs beyond torch's hooks, so that ordinary modules train as under DDP.

torch gathers the parameters of a module for its forward pass. The LightningModule is the root, and its step is the
forward pass: inside it all parameters outside of blocks are complete. This module covers the other cases: a backward
pass inside the step (manual optimization), layers that are called outside of a step, methods of blocks other than
`forward`, and parameters that only some ranks use.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from strategies.base import StrategyError
from strategies.deterministic_ddp import find_used
from strategies.fsdp_gradients import InnerGradients
from strategies.fsdp_modules import broadcast_values, sharded_modules
from strategies.fsdp_order import BlockOrder
from strategies.fsdp_root_calls import StepAsForward
from strategies.fsdp_versions import add_missing_hooks, groups_of, state_of


class NotCopied:
    """Objects that belong to one module: a copy of it, or a file, gets none (`parts` is empty)."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __deepcopy__(self, memo: object) -> NotCopied:
        return NotCopied()

    def __reduce__(self) -> tuple[Any, ...]:
        return NotCopied, ()


class ShardedSteps:
    """The groups of a sharded module, between torch's hooks and Lightning's.

    Attributes:
        redirection: runs a step as the module's forward pass.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._groups = [group for each in sharded_modules(module) for group in groups_of(each)]
        self._has_root = isinstance(module, FSDPModule)
        self._searches: bool | None = None
        self._versions: dict[int, int] = {}
        for each in sharded_modules(module):
            add_missing_hooks(each)
            if each is not module:
                _gather_for_methods(each)
                each.register_forward_pre_hook(_check_weights, prepend=True)  # type: ignore[attr-defined]
        # Safe even if ranks use different parameters in a later step than the first.
        self._set_sums_unused(True)
        if self._has_root:
            # Otherwise the first block that a callback calls would become the root.
            state_of(module)._lazy_init()
            self._gather_for_calls()
        blocks = [(name, each, state_of(each)) for name, each in module.named_modules() if _is_block(each, module)]
        self.order = BlockOrder(blocks, self._groups[0].device if self._groups else torch.device("cpu"))
        self.redirection = StepAsForward(module) if self._has_root else _ForwardRedirection()
        self._inner = InnerGradients([(state_of(each), groups_of(each)) for each in sharded_modules(module)])

    def _gather_for_calls(self) -> None:
        """Gather the root's parameters if a layer outside of blocks is called when they are freed."""
        groups = groups_of(self._module)
        managed = {id(fsdp.sharded_param) for group in groups for fsdp in group.fsdp_params}

        def gather(_: nn.Module, __: Any) -> None:
            for group in groups:
                if group.is_unsharded:
                    _share_requires_grad(group)
                else:
                    group.unshard()
                    group.wait_for_unshard()

        for child in self._module.modules():
            own = [p for p in child._parameters.values() if p is not None]
            if child is not self._module and any(id(p) in managed for p in own):
                child.register_forward_pre_hook(gather, prepend=True)

    def share_buffers(self) -> None:
        """Give all ranks rank zero's buffers, as DDP does before each forward pass."""
        broadcast_values(self._module.buffers())

    def before_step(self) -> None:
        """Take over changes of `requires_grad`, as of a layer that is trained from now on."""
        self._inner.begin_step()
        for group in self._groups:
            if group._orig_dtype is None and any(fsdp.sharded_param.requires_grad for fsdp in group.fsdp_params):
                group._init_mp_dtypes()

    def find_changed(self) -> list[str]:
        """Names of trained parameters that a step has changed while they were gathered: the change is lost."""
        changed: list[str] = []
        for group, fsdp in [(one, each) for one in self._groups for each in one.fsdp_params]:
            version = getattr(getattr(fsdp, "_unsharded_param", None), "_version", None)
            if version is None:
                continue
            # A change of `.data` has no version.
            is_other = group.is_unsharded and _differs_from_shard(fsdp)
            if is_other or self._versions.setdefault(id(fsdp), version) != version:
                changed.append(fsdp._param_fqn)
            self._versions[id(fsdp)] = version
        return changed

    def before_backward(self, loss: Tensor) -> None:
        """Search for unused parameters, and let a backward pass inside a step reduce the root's gradients."""
        self.order.before_backward()
        if not loss.requires_grad:
            return
        if self._searches is not False and not torch.is_inference(loss) and self._reduces():
            self._find_unused(loss)
        if not self._has_root:
            return
        root = state_of(self._module)
        # In the step, and in a second pass over one graph, whose first one has freed the root's parameters. Otherwise
        # torch's own hook on the step's result does it; twice would gather a block once more.
        is_freed = any(group.is_sharded for group in groups_of(self._module))
        if root._training_state == TrainingState.FORWARD or (root._training_state == TrainingState.IDLE and is_freed):
            loss.register_hook(root._pre_backward)

    def _reduces(self) -> bool:
        return all(group.reduce_grads for group in self._groups)

    def _find_unused(self, loss: Tensor) -> None:
        """Give parameters that only other ranks use a gradient of zero; without it the ranks would sum different ones.

        The search continues in later steps if it finds an unused one in the first.
        """
        every = [fsdp for group in self._groups for fsdp in group.fsdp_params if fsdp.sharded_param.requires_grad]
        used = find_used(loss)
        flags = [
            used is None or id(getattr(each, "_unsharded_param", None)) in used or _has_accumulated(each)
            for each in every
        ]
        counts = torch.tensor(flags, dtype=torch.int32, device=loss.device)
        dist.all_reduce(counts)
        counts = counts.tolist()
        if self._searches is None:
            self._searches = any(count < dist.get_world_size() for count in counts)
            if self._searches:
                self._set_sums_unused(False)
        for each, is_used, count in zip(every, flags, counts, strict=True):
            if count and not is_used:
                _give_zero_gradient(each)

    def _set_sums_unused(self, value: bool) -> None:
        for group in self._groups:
            group.reduce_scatter_unused_params = value

    def has_unreduced(self) -> bool:
        """Whether gradients of a backward pass were not summed, as torch's hooks did not see it."""
        fsdp = (each for group in self._groups if group.reduce_grads for each in group.fsdp_params)
        return any(hasattr(each, "_unsharded_param") and each.unsharded_param.grad is not None for each in fsdp)

    def reshard(self) -> None:
        """Free all gathered parameters: an optimizer changes the shards."""
        self._inner.free()
        for group in self._groups:
            if not group.is_sharded and group._training_state in (TrainingState.IDLE, TrainingState.FORWARD):
                group._to_sharded()

    def set_reduces(self, *, is_last: bool) -> None:
        """Whether the next backward pass sums the gradients over the ranks."""
        for group in self._groups:
            group.reduce_grads = group.all_reduce_grads = is_last


def _is_block(module: nn.Module, root: nn.Module) -> bool:
    return module is not root and isinstance(module, FSDPModule)


def _check_weights(block: Any, _: Any) -> None:
    """Check that a block computes with its own weights.

    Raises:
        StrategyError: `torch.func.functional_call` has put others into it.
    """
    for fsdp in (each for group in groups_of(block) for each in group.fsdp_params):
        info = fsdp._module_info
        current = info.module._parameters.get(info.param_name)
        if current is not fsdp.sharded_param and current is not getattr(fsdp, "_unsharded_param", None):
            raise StrategyError(
                f"{type(block).__name__} is called with other weights, as by `torch.func.functional_call`, but FSDP2 "
                f"gathers its own; use `strategy: ddp`"
            )


def _share_requires_grad(group: Any) -> None:
    for fsdp in group.fsdp_params:
        if fsdp.unsharded_param.requires_grad != fsdp.sharded_param.requires_grad:
            fsdp.unsharded_param.requires_grad_(fsdp.sharded_param.requires_grad)


def _differs_from_shard(fsdp: Any) -> bool:
    """Whether this rank's rows of a gathered parameter are not those of its shard."""
    shard = fsdp.sharded_param.to_local()
    rows = shard.shape[0] if fsdp.fsdp_placement.dim == 0 else 0
    # A type with its own gathering, such as torchao's for fp8, has no rows to compare.
    if not rows or hasattr(shard, "fsdp_pre_all_gather"):
        return False
    start = fsdp.mesh_info.shard_mesh_rank * fsdp.padded_sharded_param_size[0]
    gathered = fsdp.unsharded_param.detach().narrow(0, start, rows)
    expected = shard.detach().to(gathered.device, gathered.dtype)
    # By bytes, so that NaN equals NaN.
    return not torch.equal(*(each.contiguous().view(torch.uint8) for each in (gathered, expected)))


def _has_accumulated(fsdp: Any) -> bool:
    """Whether earlier micro batches gave it a gradient that is not summed over the ranks yet."""
    return fsdp.unsharded_accumulated_grad is not None


def _give_zero_gradient(fsdp: Any) -> None:
    parameter = fsdp.unsharded_param
    if parameter.grad is None:
        parameter.grad = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def _gather_for_methods(block: FSDPModule) -> None:
    """Let methods of a block other than `forward`, such as `encode(x)`, gather its parameters too."""
    assert isinstance(block, nn.Module)  # noqa: S101 -- torch's class is only a mixin
    for name in _methods_of(type(block)):
        vars(block)[name] = _gathering(block, name)


def _methods_of(kind: type) -> Iterator[str]:
    """The public methods that the user's classes define."""
    names: Mapping[str, Any] = {
        name: value
        for each in kind.__mro__
        if each.__module__.split(".")[0] not in ("torch", "lightning", "builtins")
        for name, value in vars(each).items()
    }
    return (n for n, v in names.items() if inspect.isfunction(v) and not n.startswith("_") and n != "forward")


def _gathering(block: Any, name: str) -> Any:
    method = getattr(block, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        state = state_of(block)
        takes_tensors = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        if not takes_tensors or state._training_state != TrainingState.IDLE:
            return method(*args, **kwargs)
        args, kwargs = state._pre_forward(block, args, kwargs)
        return state._post_forward(block, args, method(*args, **kwargs))

    return call
