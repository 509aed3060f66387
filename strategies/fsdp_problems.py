"""Models and callbacks that FSDP2 cannot train, as errors with advice."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.optim import Adafactor

from strategies.base import StrategyError
from strategies.fsdp_versions import groups_of
from strategies.sharding import ShardOptions, ShardVariant
from strategies.units import join_some
from strategies.weight_callbacks import describe_weight_callback, list_weight_callbacks

# Of torch's error where an operation gets a shard.
_MIXED = "mixed torch.Tensor and DTensor"
# Of its error about gradients of what the graph does not have.
_UNUSED = "to not have been used in the graph"


def check_callbacks(trainer: Trainer) -> None:
    """Check that no callback copies the model, which is impossible with shards.

    Raises:
        StrategyError: names the callback.
    """
    for name in list_weight_callbacks(map(type, trainer.callbacks)):  # pyright: ignore[reportAttributeAccessIssue]
        raise StrategyError(f"{describe_weight_callback(name)}; remove it, or use `strategy: ddp`")


def check_own_shards(module: nn.Module, variant: ShardVariant, options: ShardOptions, mesh: DeviceMesh | None) -> None:
    """Check that parts that `configure_model` has sharded are sharded as the strategy requires.

    Raises:
        StrategyError: it asks for replicas, blocks or offload that they do not have.
    """
    name = type(module).__name__
    groups = [group for each in module.modules() if isinstance(each, FSDPModule) for group in groups_of(each)]
    if options.wrap:
        raise StrategyError(f"fsdp.wrap is given, but {name}.configure_model shards by itself; remove one of them")
    shape = (1,) if mesh is None else tuple(mesh.shape)
    if variant.hybrid and shape[0] > 1 and any(group.mesh_info.mesh.ndim == 1 for group in groups):
        raise StrategyError(
            f"{name}.configure_model shards over all ranks, but hsdp has {shape[0]} replicas; shard over "
            f'`init_device_mesh(device, {shape}, mesh_dim_names=("replicate", "shard"))`, or use '
            "`strategy: fsdp2`"
        )
    if variant.offload and not all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups):
        raise StrategyError(
            f"{name}.configure_model shards without offload, but the strategy is fsdp2_offload; give `fully_shard` an "
            "`offload_policy=CPUOffloadPolicy()`, or use `strategy: fsdp2`"
        )


def check_new_parameters(module: nn.Module, known: Collection[str]) -> None:
    """Check after the first step that it created no parameter.

    Args:
        module: sharded or gathered.
        known: the names of its parameters before.

    Raises:
        StrategyError: names those that it created.
    """
    names = [name for name, _ in module.named_parameters()]
    if len(names) > len(known):
        created = [name for name in names if name not in known]
        raise StrategyError(
            f"{type(module).__name__} created {join_some(created)} in its first step, which no rank would share and no "
            "optimizer has; create parameters in __init__ or `configure_model`"
        )


def check_changed_parameters(module: nn.Module, names: Sequence[str]) -> None:
    """Check that a step did not change trained parameters by itself.

    Raises:
        StrategyError: names those that it changed.
    """
    if names:
        raise StrategyError(
            f"{type(module).__name__} changes {join_some(names)} in its step, but under FSDP2 a step has a copy of the "
            "weights that is gathered for it; change them in `on_train_batch_end`, where they are shards"
        )


@contextmanager
def explain_unsharded(module: LightningModule) -> Iterator[None]:
    """Replace torch's error about a shard in an operation.

    Raises:
        StrategyError: names the layer, and the block that it belongs to.
    """
    try:
        yield
    except RuntimeError as error:
        if _UNUSED in str(error):
            raise StrategyError(
                f"{_find_line(error)} takes gradients of weights that its graph does not have: inside of a step FSDP2 "
                "computes with gathered copies of the weights of blocks; use `strategy: ddp`"
            ) from error
        if _MIXED not in str(error):
            raise
        raise StrategyError(_describe(module, error)) from error


def explain_elsewhere(error: BaseException) -> None:
    """Give torch's error about a shard, in a hook or a backward pass, a message of one line with advice."""
    if not isinstance(error, RuntimeError) or _MIXED not in str(error):
        return
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "_engine_run_backward" for frame in frames):
        message = (
            "the backward pass combines shards of weights with ordinary tensors, since the step uses weights outside "
            "of the forward pass of their block; use `p.full_tensor()` there, or `strategy: ddp`"
        )
    else:
        message = (
            f"{_find_line(error)} combines a sharded tensor with an ordinary one; read the "
            "complete one by `full_tensor()` on every rank, or use `strategy: ddp`"
        )
    error.args = (message,)


@contextmanager
def explain_step(optimizer: Any) -> Iterator[None]:
    """Replace torch's errors about shards in the step of an optimizer.

    Raises:
        StrategyError: names the optimizer.
    """
    try:
        yield
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        # The step calls the closure, with the forward and backward passes.
        is_update = not any(frame.name in ("closure", "_engine_run_backward") for frame in frames)
        if not is_update or not (_MIXED in str(error) or "placement" in str(error)):
            raise
        raise StrategyError(_describe_optimizer(type(optimizer).__name__)) from error


def check_optimizer(optimizer: Any) -> None:
    """Check that an optimizer can update shards.

    Raises:
        StrategyError: names the optimizer.
    """
    if isinstance(optimizer, Adafactor):
        raise StrategyError(_describe_optimizer(type(optimizer).__name__))


def _describe_optimizer(name: str) -> str:
    return (
        f"the optimizer {name} cannot update sharded parameters; use one that computes with whole parameters and "
        "gradients only, such as torch.optim.AdamW, or `strategy: ddp`"
    )


def refuse_copy(module: Any, _: Any) -> NoReturn:
    """`__deepcopy__` of a sharded module."""
    raise StrategyError(
        f"a copy of {type(module).__name__} is impossible, as FSDP2 shards it; read its weights by "
        "`{name: p.full_tensor() for name, p in module.named_parameters()}` on every rank, copy it in __init__, or use "
        "`strategy: ddp`"
    )


def _describe(root: LightningModule, error: Exception) -> str:
    names = {id(each): name for name, each in root.named_modules()}
    path, at = "", ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            path = names[id(owner)]
        if not _is_library(frame.f_code.co_filename):
            at = f"{frame.f_code.co_filename}:{line}"
    block = _block_of(root, path)
    if block is None:
        return (
            f"{at} uses weights that are sharded at that moment: those of a block outside of its forward pass, or any "
            "after a backward pass in the same step; call the module that has them, or use `strategy: ddp`"
        )
    kind, outer = type(root.get_submodule(path)).__name__, type(root.get_submodule(block)).__name__
    return (
        f"{at} calls {path} ({kind}) directly, but FSDP2 gathers its weights only when {block} ({outer}) is called; "
        f"call {block}, or set `fsdp.wrap` to the classes that are called, such as [{kind}]"
    )


def _find_line(error: BaseException) -> str:
    """The last line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f"{frame.filename}:{frame.lineno}" for frame in frames if not _is_library(frame.filename)]
    return users[-1] if users else "an operation"


def _is_library(file: str) -> bool:
    return "site-packages" in file or "/strategies/" in file or "/launcher/" in file or file.startswith("<")


def _block_of(root: nn.Module, path: str) -> str | None:
    """The name of the innermost block around a module."""
    parts = path.split(".") if path else []
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if isinstance(root.get_submodule(name), FSDPModule):
            return name
    return None
