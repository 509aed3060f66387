"""Parameters that every rank has completely: scalars and other types, and frozen ones outside of blocks.

Optimizers, clipping and checkpoints see them as DTensors like all others. During a step the module has ordinary
parameters with the same memory, whose gradients are averaged after each backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True)
class _Replica:
    plain: nn.Parameter
    held: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]

    def join(self) -> None:
        """Share the memory again after an assignment to `.data`."""
        local = _local(self.held)
        if local.data_ptr() != self.plain.data_ptr():
            with torch.no_grad():
                local.copy_(self.plain)
            self.plain.data = local

    def put(self, parameter: nn.Parameter) -> None:
        for module, name in self.places:
            module._parameters[name] = parameter


class ReplicatedParameters:
    """The parameters, and their gradients over the ranks."""

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], mesh: DeviceMesh) -> None:
        wanted = {id(p) for p in parameters}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for child in module.modules():
            for name, p in child._parameters.items():
                if p is not None and id(p) in wanted:
                    places.setdefault(id(p), []).append((child, name))
        self._replicas = [_Replica(p, _replicate(p, mesh), tuple(places[id(p)])) for p in parameters]
        self._depth = 0
        for replica in self._replicas:
            replica.put(replica.held)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within it the module has ordinary parameters."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Give the module ordinary parameters, until as many calls of `leave`."""
        self._depth += 1
        if self._depth == 1:
            for replica in self._replicas:
                replica.plain.requires_grad_(replica.held.requires_grad)
                replica.put(replica.plain)

    def leave(self) -> None:
        """See `enter`."""
        self._depth -= 1
        if self._depth == 0:
            for replica in self._replicas:
                replica.join()
                replica.put(replica.held)

    def reduce(self) -> None:
        """Average the gradients of a backward pass, and add them. A collective of all ranks."""
        trained = [replica for replica in self._replicas if replica.plain.requires_grad]
        if not trained:
            return
        values = [_gradient_values(replica.plain) for replica in trained]
        used = torch.tensor([r.plain.grad is not None for r in trained], dtype=values[0].dtype, device=values[0].device)
        total = torch.cat([used, *values])
        dist.all_reduce(total)
        flags, *sums = total.split([len(values), *(value.numel() for value in values)])
        for replica, is_used, value in zip(trained, flags.tolist(), sums, strict=True):
            replica.plain.grad = None
            if is_used:
                _add_gradient(replica.held, value / dist.get_world_size())


def _local(held: nn.Parameter) -> Tensor:
    assert isinstance(held, DTensor)  # noqa: S101 -- made by `_replicate`
    return held.to_local().detach()


def _replicate(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    local = DTensor.from_local(parameter.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return nn.Parameter(local, parameter.requires_grad)


def _gradient_values(parameter: nn.Parameter) -> Tensor:
    """The gradient as a flat real tensor; a complex one as pairs of numbers."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
    real = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).flatten()
    return real if real.element_size() >= 4 else real.float()


def _add_gradient(held: nn.Parameter, value: Tensor) -> None:
    assert isinstance(held, DTensor)  # noqa: S101 -- made by `_replicate`
    local = _local(held)
    shape = local.shape
    gradient = torch.view_as_complex(value.reshape(*shape, 2)) if local.is_complex() else value.reshape(shape)
    whole = DTensor.from_local(gradient.to(local.dtype), held.device_mesh, held.placements, run_check=False)
    held.grad = whole if held.grad is None else held.grad + whole
