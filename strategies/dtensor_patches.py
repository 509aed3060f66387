"""Changes of torch's DTensor and Lightning's use of it, for code that reads sharded parameters as ordinary tensors."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities import grads
from torch import Tensor
from torch.distributed.tensor import DTensor

from strategies.dtensor_numbers import patch_numbers

_ASSIGN = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]
_PICKLE = Tensor.__reduce_ex__
_READ = Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def patch_dtensors() -> None:
    """Make numbers of sharded tensors those of the complete ones, in this process.

    torch 2.13 returns the number of this rank's shard for `p.grad.norm().item()`, ignores an assignment to `.data`, and
    cannot format a number. All ranks must read a number together, as for any operation on shards.
    """
    patch_numbers()
    handlers = DTensor._op_dispatcher._custom_op_handlers
    handlers[torch.ops.aten._local_scalar_dense.default] = _read_number
    DTensor.data = property(_read_data, _assign_data)  # pyright: ignore[reportAttributeAccessIssue]
    DTensor.__reduce_ex__ = _pickle_shard  # pyright: ignore[reportAttributeAccessIssue]
    DTensor.__format__ = _format  # pyright: ignore[reportAttributeAccessIssue]
    grads.torch = _CompleteTensors()  # pyright: ignore[reportAttributeAccessIssue]
    log: Any = _ResultCollection.log  # pyright: ignore[reportAttributeAccessIssue]
    _ResultCollection.log = _complete_logs(log)  # pyright: ignore[reportAttributeAccessIssue]


def _read_number(_: Any, args: tuple[Any, ...], __: Any) -> Any:
    return args[0].full_tensor().item()


def _read_data(tensor: DTensor) -> Any:
    return _READ(tensor)


def _assign_data(tensor: DTensor, value: Tensor) -> None:
    """Copy a value like the shards into them, as torch would only change the wrapper."""
    if not isinstance(value, DTensor) or not _is_like(tensor, value):
        _ASSIGN(tensor, value)
        return
    with torch.no_grad():
        tensor.to_local().copy_(value.redistribute(placements=tensor.placements).to_local())


def _is_like(one: DTensor, other: DTensor) -> bool:
    is_same_kind = (one.shape, one.dtype, one.device_mesh) == (other.shape, other.dtype, other.device_mesh)
    return is_same_kind and one.to_local().device == other.to_local().device


def _complete_logs(log: Any) -> Any:
    """Log complete values: rank zero alone reads them later."""

    @functools.wraps(log)
    def call(results: _ResultCollection, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log(results, fx, name, value.full_tensor() if isinstance(value, DTensor) else value, *args, **kwargs)

    return call


def _pickle_shard(tensor: DTensor, proto: Any) -> Any:
    """Pickle a sharded tensor as torch does, and warn: `torch.save(model.state_dict())` saves a part of the model."""
    warnings.warn(
        "a sharded tensor (DTensor) is saved, of which this rank has only a part; save a checkpoint by "
        "`trainer.save_checkpoint`, which `launcher convert` makes one file of, or call `tensor.full_tensor()` on all "
        "ranks",
        stacklevel=2,
    )
    return _PICKLE(tensor, proto)


def _format(tensor: DTensor, spec: str) -> str:
    return format(tensor.item(), spec) if spec and tensor.dim() == 0 else object.__format__(tensor, spec)


class _CompleteTensors:
    """torch for Lightning's `grad_norm`, which makes a tensor of a list of norms."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, values: Any, **options: Any) -> Tensor:
        """A tensor of the complete values."""
        return torch.tensor([v.item() if isinstance(v, DTensor) else v for v in values], **options)
