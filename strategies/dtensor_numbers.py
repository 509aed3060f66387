"""Sharded tensors among ordinary ones: numbers of complete tensors, random values as under DDP, and errors with advice."""

from __future__ import annotations

import functools
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Optimizer

from strategies.base import StrategyError

_OPERATORS = ("add", "sub", "mul", "truediv", "pow")
_COMPARISONS = ("lt", "le", "gt", "ge")
_RANDOM = ("normal_", "uniform_", "bernoulli_.float", "bernoulli_.Tensor", "exponential_", "log_normal_", "cauchy_",
           "geometric_", "random_", "random_.to", "random_.from")  # fmt: skip
_RANDOM_LIKE = ("rand_like", "randn_like", "randint_like", "randint_like.low_dtype", "bernoulli")


class MixedTensorError(StrategyError):
    """An operation got a sharded tensor and an ordinary one.

    Attributes:
        at: the file and line of the user's code, or empty.
    """

    def __init__(self, message: str, at: str = "") -> None:
        super().__init__(message)
        self.at = at


def patch_numbers() -> None:
    """Change torch's DTensor in this process."""
    for name in _OPERATORS:
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(DTensor, method, _complete(getattr(Tensor, method)))
    for name in _COMPARISONS:
        setattr(DTensor, f"__{name}__", _complete(getattr(Tensor, f"__{name}__")))
    kind: Any = DTensor
    kind.numpy = lambda tensor, **options: tensor.full_tensor().numpy(**options)
    kind.tolist = lambda tensor: tensor.full_tensor().tolist()
    kind.__array__ = lambda tensor, *dtype, **_: tensor.full_tensor().detach().cpu().__array__(*dtype)
    handlers = DTensor._op_dispatcher._custom_op_handlers
    for name in (*_RANDOM, *_RANDOM_LIKE):
        base, _, overload = name.partition(".")
        handlers[getattr(getattr(torch.ops.aten, base), overload or "default")] = _draw
    kind._op_dispatcher._try_replicate_spec_for_scalar_tensor = _Replication(
        DTensor._op_dispatcher._try_replicate_spec_for_scalar_tensor
    )


def _complete(operator: Any) -> Any:
    """The operator, whose sharded number is completed where the other operand is an ordinary tensor.

    torch takes the ordinary one for a part of a sum, and adds it once for each rank.
    """

    @functools.wraps(operator)
    def call(tensor: DTensor, other: Any) -> Any:
        if isinstance(other, Tensor) and not isinstance(other, DTensor) and tensor.dim() == 0:
            # The ranks' losses differ: as under DDP the gradient is their average.
            average = [Partial("avg")] * tensor.device_mesh.ndim
            return operator(tensor.full_tensor(grad_placements=average), other)
        if isinstance(other, DTensor) and other.dim() == 0 and tensor.dim() > 0:
            return operator(tensor, other)
        return operator(tensor, other)

    return call
