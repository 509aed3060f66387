"""Turns a module into shards: values of rank zero on every rank, materialised and sharded block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from strategies.base import StrategyError
from strategies.fsdp_problems import refuse_copy
from strategies.fsdp_versions import apply_fully_shard
from strategies.units import join_some

_BROADCAST_BYTES = 250 << 20  # as DDP
# A frozen parameter of another type is not gathered: mixed precision would convert it.
_GATHERED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModuleSharding:
    """How `shard_module` shards.

    Attributes:
        device: of this rank.
        reshard: whether a block's parameters are freed after its forward pass.
        options: further arguments of `fully_shard`.
    """

    device: torch.device
    reshard: bool
    options: dict[str, Any]


def shard_module(module: nn.Module, blocks: Sequence[nn.Module], sharding: ModuleSharding) -> list[nn.Parameter]:
    """Shard each block, inner ones first, then the rest with the module itself as root.

    Returns:
        The parameters that every rank has completely: trained ones that `fully_shard` does not support, and frozen ones
        outside of blocks. Those are needed in the whole step anyway, and a step may change them, as the averaged copy
        of a network; a change of gathered parameters would be lost.
    """
    kept, replicated = _unsupported(module, is_mixed=sharding.options["mp_policy"].param_dtype is not None)
    frozen = _frozen_outside(module, blocks, kept)
    kept, replicated = kept | set(frozen), [*replicated, *frozen]
    options = {**sharding.options, "ignored_params": kept}
    for block in reversed(blocks):
        _prepare(block, sharding.device)
        _shard(block, reshard_after_forward=sharding.reshard, **options)
    _prepare(module, sharding.device)
    _shard(module, reshard_after_forward=False, **options)
    return replicated


def find_whole(module: nn.Module, blocks: Sequence[nn.Module], *, is_mixed: bool) -> set[nn.Parameter]:
    """The parameters that `shard_module` leaves complete on every rank."""
    kept, _ = _unsupported(module, is_mixed=is_mixed)
    return kept | set(_frozen_outside(module, blocks, kept))


def _frozen_outside(module: nn.Module, blocks: Sequence[nn.Module], kept: set[nn.Parameter]) -> list[nn.Parameter]:
    inside = {p for block in blocks for p in block.parameters()}
    return [p for p in module.parameters() if not (p.requires_grad or p in inside or p in kept or _is_sharded(p))]


def _shard(module: nn.Module, **options: Any) -> None:
    """Apply `fully_shard`, and keep the name of the module's class, which summaries and messages print."""
    original = type(module)
    apply_fully_shard(module, **options)
    kind: Any = type(module)
    kind.__deepcopy__ = refuse_copy
    kind.__name__, kind.__qualname__ = original.__name__, original.__qualname__
    kind.__module__, kind.__doc__ = original.__module__, original.__doc__


def check_shards(module: nn.Module) -> None:
    """Check that the parameters can be replaced by shards.

    Raises:
        StrategyError: names those that have no shape yet, or hooks on their gradients.
    """
    name = type(module).__name__
    tensors = [*module.named_parameters(), *module.named_buffers()]
    lazy = [name for name, t in tensors if isinstance(t, UninitializedParameter | UninitializedBuffer)]
    if lazy:
        raise StrategyError(
            f"{join_some(lazy)} of {name} have no shape yet, and FSDP2 shards them before the optimizer is made; run a "
            "batch through the lazy modules in `configure_model` or `setup`"
        )
    hooked = [key for key, p in module.named_parameters() if _has_hooks(p)]
    if hooked:
        raise StrategyError(
            f"{join_some(hooked)} of {name} has a gradient hook, but FSDP2 replaces the parameter by a shard; register "
            "the hook in `on_fit_start`, where it gets the gradient of the shard"
        )


def _has_hooks(parameter: Any) -> bool:
    return not _is_sharded(parameter) and bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _unsupported(module: nn.Module, *, is_mixed: bool) -> tuple[set[nn.Parameter], list[nn.Parameter]]:
    """The parameters that are not sharded, and the trainable ones among them.

    `fully_shard` cannot shard scalars, and all trained parameters of a group must have one type. In mixed precision the
    weights of a batch norm must have the type of its statistics.
    """
    norms = [m for m in module.modules() if is_mixed and isinstance(m, _BatchNorm)]
    in_norms = {p for norm in norms for p in norm.parameters()}
    sizes: Counter[torch.dtype] = Counter()
    for p in module.parameters():
        if p.requires_grad and p.is_floating_point():
            sizes[p.dtype] += p.numel()
    usual = sizes.most_common(1)[0][0] if sizes else None

    def is_unsupported(p: nn.Parameter) -> bool:
        if _is_sharded(p):
            return False
        is_other_type = p.dtype != usual if p.requires_grad else p.dtype not in (usual, *_GATHERED)
        return p.dim() == 0 or p in in_norms or is_other_type

    kept = {p for p in module.parameters() if is_unsupported(p)}
    return kept, [p for p in module.parameters() if p in kept and p.requires_grad]


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor)


def _prepare(module: nn.Module, device: torch.device) -> None:
    """Move what is not sharded yet to the device, with the values of rank zero."""
    materialize(module, device)

    _move(module, device)
    whole = [t for t in (*module.parameters(), *module.buffers()) if not isinstance(t, DTensor)]
    for tensor in whole:
        if not tensor.is_contiguous():
            tensor.data = tensor.data.contiguous()
    broadcast_values(whole)


def _move(module: nn.Module, device: torch.device) -> None:
    """Move all but what is sharded; a metric moves its states too."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        module._apply(lambda tensor: tensor.to(device))
        return
    for tensor in _own(module):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    for child in module.children():
        _move(child, device)


def broadcast_values(tensors: Iterable[Tensor]) -> None:
    """Give all ranks rank zero's values."""
    values = [tensor.detach() for tensor in tensors if tensor.numel()]
    if values:
        dist._broadcast_coalesced(_get_default_group(), values, _BROADCAST_BYTES, 0)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate what is on the meta device, and initialise it by the modules' `reset_parameters`.

    Raises:
        StrategyError: a module cannot initialise itself.
    """
    on_meta = [child for child in module.modules() if any(tensor.is_meta for tensor in _own(child))]
    made: dict[int, Tensor] = {}
    for child in on_meta:
        if _reset_of(child) is None:
            raise StrategyError(
                f"the parameters of {type(child).__name__} are on the meta device, but the class has no method "
                "`reset_parameters` that gives them values; define it, or build that module on the CPU"
            )
    for child in on_meta:
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    # Tied parameters stay tied.
                    if id(tensor) not in made:
                        made[id(tensor)] = _allocate(tensor, device)
                    tensors[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
    # A module may set parameters of its children again.
    for child in reversed(on_meta):
        reset = _reset_of(child)
        if reset is not None:
            with torch.no_grad():
                reset()


def _own(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _allocate(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _reset_of(module: nn.Module) -> Any:
    """The method that initialises a module's own parameters; some of torch's modules call it `_reset_parameters`."""
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def sharded_modules(module: nn.Module) -> list[FSDPModule]:
    """The modules in it that `fully_shard` was applied to."""
    return [each for each in module.modules() if isinstance(each, FSDPModule)]
