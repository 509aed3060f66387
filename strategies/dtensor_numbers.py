"""Sharded tensors among ordinary ones: numbers of complete tensors, and random values as under DDP."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_OPERATORS = ("add", "sub", "mul", "truediv")
_RANDOM = ("normal_", "uniform_", "bernoulli_.float", "bernoulli_.Tensor", "exponential_", "log_normal_", "cauchy_",
           "geometric_", "random_", "random_.to", "random_.from")  # fmt: skip
_RANDOM_LIKE = ("rand_like", "randn_like", "randint_like", "randint_like.low_dtype", "bernoulli")
# torch adds an ordinary number in them once for all ranks: rank zero's.
_JOINING = (torch.ops.aten.stack.default, torch.ops.aten.cat.default)


def patch_numbers() -> None:
    """Change torch's DTensor, and Tensor where it meets one, in this process."""
    kind: Any = DTensor
    for name in _OPERATORS:
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(kind, method, _complete_self(getattr(Tensor, method)))
        method = f"__i{name}__"
        setattr(Tensor, method, _complete_other(getattr(Tensor, method)))
    kind.numpy = lambda tensor, **options: tensor.full_tensor().numpy(**options)
    kind.tolist = lambda tensor: tensor.full_tensor().tolist()
    kind.__array__ = lambda tensor, *types, **_: tensor.full_tensor().__array__(*types)
    dispatcher: Any = DTensor._op_dispatcher
    for name in (*_RANDOM, *_RANDOM_LIKE):
        base, _, overload = name.partition(".")
        dispatcher._custom_op_handlers[getattr(getattr(torch.ops.aten, base), overload or "default")] = _draw
    replicate = dispatcher._try_replicate_spec_for_scalar_tensor
    dispatcher._try_replicate_spec_for_scalar_tensor = functools.partial(_replicate_number, replicate)


def _replicate_number(replicate: Any, operation: Any, *given: Any) -> Any:
    """What torch does with an ordinary number among shards.

    Raises:
        RuntimeError: as torch's about other ordinary tensors; `fsdp_problems` explains it.
    """
    if operation in _JOINING:
        raise RuntimeError(f"{operation}: got mixed torch.Tensor and DTensor")
    return replicate(operation, *given)


def _complete_self(operator: Any) -> Any:
    """Complete a sharded number that meets an ordinary tensor.

    torch takes the ordinary one for a part of a sum over the ranks, and returns the result of rank zero's on all.
    """

    @functools.wraps(operator)
    def call(tensor: DTensor, other: Any) -> Any:
        return operator(_complete(tensor, other), other)

    return call


def _complete_other(operator: Any) -> Any:
    @functools.wraps(operator)
    def call(tensor: Tensor, other: Any) -> Any:
        return operator(tensor, _complete(other, tensor) if isinstance(other, DTensor) else other)

    return call


def _complete(tensor: DTensor, other: Any) -> Tensor:
    if tensor.dim() or not isinstance(other, Tensor) or isinstance(other, DTensor):
        return tensor
    return _Averaged.apply(tensor.full_tensor())  # pyright: ignore[reportReturnType]


class _Averaged(torch.autograd.Function):
    """Averages the gradient over the ranks, whose losses differ, as DDP does."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        """See the class."""
        return value.clone()

    @staticmethod
    def backward(_: Any, *gradients: Any) -> Any:
        """See the class."""
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def _draw(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draw the complete tensor with this rank's generator and keep the shard, as each rank has it under DDP."""
    target, *rest = args
    is_read = operation is torch.ops.aten.bernoulli.default
    complete = target.full_tensor() if is_read else torch.empty(target.shape, dtype=target.dtype, device=target.device)
    drawn = operation(complete, *(each.full_tensor() if isinstance(each, DTensor) else each for each in rest), **kwargs)
    shard = distribute_tensor(drawn, target.device_mesh, target.placements, src_data_rank=None)
    if not operation._schema.name.endswith("_"):
        return shard
    target._local_tensor.copy_(shard._local_tensor)
    return target
