"""Models and callbacks that FSDP2 cannot train, as errors with advice."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from strategies.base import StrategyError
from strategies.units import join_some
from strategies.weight_callbacks import describe_weight_callback, list_weight_callbacks

# Of torch's error where an operation gets a shard.
_MIXED = "mixed torch.Tensor and DTensor"


def check_callbacks(trainer: Trainer) -> None:
    """Check that no callback copies the model, which is impossible with shards.

    Raises:
        StrategyError: names the callback.
    """
    for name in list_weight_callbacks(map(type, trainer.callbacks)):  # pyright: ignore[reportAttributeAccessIssue]
        raise StrategyError(f"{describe_weight_callback(name)}; remove it, or use `strategy: ddp`")


def check_new_parameters(module: nn.Module, known: Sequence[tuple[ReferenceType[Any], nn.Parameter]]) -> None:
    """Check after the first step that it created no parameter.

    Raises:
        StrategyError: names those that it created.
    """
    names = {name for name, _ in module.named_parameters()}
    count = len({id(new) for _, new in known})
    if len(names) > count:
        kept = {id(new) for _, new in known}
        created = [name for name, p in module.named_parameters() if id(p) not in kept]
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
        if _MIXED not in str(error):
            raise
        raise StrategyError(_describe(module, error)) from error


def _describe(root: LightningModule, error: RuntimeError) -> str:
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


def _is_library(file: str) -> bool:
    return "site-packages" in file or "/strategies/" in file or file.startswith("<")


def _block_of(root: nn.Module, path: str) -> str | None:
    """The name of the innermost block around a module."""
    parts = path.split(".") if path else []
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if isinstance(root.get_submodule(name), FSDPModule):
            return name
    return None
