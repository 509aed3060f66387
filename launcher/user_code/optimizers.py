"""Gives a model the optimizer and the scheduler that the config names, as LightningCLI does."""

from __future__ import annotations

from types import MethodType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI, LRSchedulerTypeTuple
from torch.optim import Optimizer

from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from launcher.user_code.arguments import argument_problems, plain_arguments
from launcher.user_code.imports import import_class

# Field, base classes, and the argument that comes from the model.
_BLOCKS: tuple[tuple[str, tuple[type[Any], ...], str], ...] = (
    ("optimizer", (Optimizer,), "params"),
    ("lr_scheduler", LRSchedulerTypeTuple, "optimizer"),
)


def check_optimizers(config: RunConfig) -> tuple[dict[str, type[Any]], list[Problem]]:
    """The classes of the config's optimizer and scheduler that can be imported, and the problems with them."""
    problems: list[Problem] = []
    found: dict[str, type[Any]] = {}
    if config.lr_scheduler and not config.optimizer:
        problems.append(Problem("lr_scheduler", "given without an optimizer; add one, as in `optimizer: Adam`"))
    for field, bases, first in _BLOCKS:
        spec = getattr(config, field)
        if not spec:
            continue
        try:
            found[field] = import_class(spec["class_path"], bases, f"{field}.class_path")
            problems += argument_problems(found[field], field, spec, {first})
        except ConfigError as error:
            problems += error.problems
    return found, problems


def add_configure_optimizers(model: pl.LightningModule, config: RunConfig) -> None:
    """Make the model's `configure_optimizers` create the optimizer of the config, if it names one."""
    if not config.optimizer:
        return

    def configure_optimizers(module: pl.LightningModule) -> Any:
        # Created here, not with the model, whose parameters may change until then.
        made: list[Any] = [module.parameters()]
        for field, bases, first in _BLOCKS:
            spec = getattr(config, field)
            if spec:
                cls = import_class(spec["class_path"], bases, field)
                made.append(cls(made[-1], **plain_arguments(cls, spec, {first})))
        return LightningCLI.configure_optimizers(module, *made[1:])

    model.configure_optimizers = MethodType(configure_optimizers, model)


def optimizer_notice(model: pl.LightningModule | type[pl.LightningModule], config: RunConfig) -> str | None:
    """The notice if the config's optimizer replaces the model's own; None otherwise."""
    cls = model if isinstance(model, type) else type(model)
    own = getattr(cls, "configure_optimizers", None)
    if not config.optimizer or own is pl.LightningModule.configure_optimizers:
        return None
    return f"`optimizer` in the config replaces {cls.__name__}.configure_optimizers"
