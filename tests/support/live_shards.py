"""FSDP2 over gloo as the strategy applies it, without Lightning, for tests of memory formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor import DTensor
from typing_extensions import override

from strategies.fsdp_blocks import find_blocks
from strategies.fsdp_modules import ModuleSharding, shard_module
from strategies.fsdp_replicas import ReplicatedParameters
from strategies.registry import find_strategy
from strategies.sharding import ShardVariant
from strategies.storage_tracker import StorageTracker

# In all versions of torch; since 2.13 the first two have the names of the next two.
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single",
               "all_reduce")  # fmt: skip
VARIANTS = ("fsdp2", "fsdp2_grad_op", "hsdp", "fsdp2_offload")


def variant_of(name: str) -> ShardVariant:
    entry: Any = find_strategy(name)
    return entry.variant


def shard_ranks(name: str, world_size: int) -> int:
    """Under `hsdp` half of the ranks share the states, so that there are two replicas."""
    return max(world_size // 2, 1) if name == "hsdp" else world_size


def shard(root: nn.Module, name: str, dtype: str, in_type: str = "fp32") -> ReplicatedParameters:
    """Shard the module over all ranks, as the strategy does; `dtype` is 'fp32', 'bf16' (true) or 'mixed'."""
    variant, world = variant_of(name), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if variant.hybrid:
        ranks = shard_ranks(name, world)
        mesh = init_device_mesh("cpu", (world // ranks, ranks), mesh_dim_names=("replicate", "shard"))
    sums = torch.float32 if in_type == "fp32" and dtype != "fp32" else None
    policy = MixedPrecisionPolicy(torch.bfloat16 if dtype == "mixed" else None, sums, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=False) if variant.offload else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    sharding = ModuleSharding(torch.device("cpu"), variant.reshard, options)
    return ReplicatedParameters(root, shard_module(root, find_blocks(root), sharding), mesh)


def set_last(net: nn.Module, *, is_last: bool, every: bool) -> None:
    assert isinstance(net, FSDPModule)
    net.set_requires_gradient_sync(every or is_last)


class ShardTracker(StorageTracker):
    """Also follows storages that FSDP2 frees and allocates again, and the local tensors of distributed ones.

    Tensors that gloo creates for itself are not counted: NCCL has none.
    """

    _is_paused = False

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)

    @override
    def _count(self, tensor: Tensor) -> None:
        if not self._is_paused:
            super()._count(tensor)
        elif id(tensor.untyped_storage()) not in self._live:
            self.ignore([tensor])

    @contextmanager
    def following(self) -> Iterator[None]:
        allocate, free = _fsdp_param.alloc_storage, _fsdp_param.free_storage

        def allocated(tensor: Tensor) -> None:
            allocate(tensor)
            self._count(tensor)

        def freed(tensor: Tensor) -> None:
            free(tensor)
            self._drop(id(tensor.untyped_storage()))

        def pausing(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                self._is_paused = True
                try:
                    return call(*args, **kwargs)
                finally:
                    self._is_paused = False

            return run

        with ExitStack() as stack:
            for module in (_fsdp_param, _fsdp_param_group):
                for name, replacement in (("alloc_storage", allocated), ("free_storage", freed)):
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, replacement))
            for name in filter(partial(hasattr, dist), COLLECTIVES):
                stack.enter_context(patch.object(dist, name, pausing(getattr(dist, name))))
            yield
