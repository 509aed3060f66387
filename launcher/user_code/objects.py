"""The user's objects of one run: created from the config, or given in code."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from typing_extensions import override

from launcher.config.coordinator_arguments import to_tuple
from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from launcher.user_code.classes import (
    PLUGINS,
    find_duplicate_plugins,
    known_classes,
    make_callbacks,
    make_loggers,
    make_objects,
    make_plugins,
    name_of,
)
from launcher.user_code.optimizers import optimizer_notice
from strategies.weight_callbacks import list_weight_callbacks


@dataclass(frozen=True)
class UserObjects:
    """The model, the data and other objects of the user."""

    model: pl.LightningModule
    data: pl.LightningDataModule | None = None  # None if the model has its own loaders
    callbacks: Sequence[pl.Callback] = ()
    loggers: Sequence[Logger] = ()  # in addition to W&B
    precision_plugin: Precision | None = None  # decides the precision instead of the plan
    notices: Sequence[str] = ()  # messages for the user about these objects
    plugins: Sequence[Any] = ()  # of other kinds, which replace the launcher's
    profiler: Profiler | None = None  # None for the one that the config names

    @property
    def _loader_owner(self) -> pl.LightningDataModule | pl.LightningModule:
        return self.model if self.data is None else self.data

    def use_batch_size(self, size: int) -> None:
        """Set the micro batch size where the object that makes the loaders keeps it, as Lightning's finder does."""
        if not isinstance(self.data, Loaders):
            set_batch_size(self._loader_owner, size)

    def with_options(self, options: dict[str, Any]) -> UserObjects:
        """Add the objects in the options of Lightning's Trainer, which are removed from the options."""
        made, profiler = self, options.get("profiler")
        if profiler is not None and not isinstance(profiler, str):
            made = replace(made, profiler=options.pop("profiler"))
        for name, kind, field in (("callbacks", pl.Callback, "callbacks"), ("logger", Logger, "loggers")):
            added = () if isinstance(options.get(name), bool) else to_tuple(options.get(name))
            # Others are reported with all other problems of the arguments.
            if added and all(isinstance(each, kind) for each in added):
                del options[name]
                made = replace(made, **{field: (*getattr(made, field), *added)})
        return made

    def traits(self) -> dict[str, Any]:
        """Properties of the objects, as plain JSON values; see `launcher.user_code.classes.UserClasses.traits`."""
        plugin = None if self.precision_plugin is None else name_of(type(self.precision_plugin))
        return {
            "model": name_of(type(self.model)),
            "batch_size": find_batch_size(self._loader_owner),
            "static_graph": bool(getattr(self.model, "static_graph", False)),
            "precision_plugin": plugin,
            "weight_callbacks": list_weight_callbacks(map(type, self.callbacks)),
        }


class Loaders(pl.LightningDataModule):
    """Existing loaders as a LightningDataModule."""

    def __init__(self, train: Any, validation: Any = None) -> None:
        super().__init__()
        self._train = train
        self._validation = validation
        self.batch_size: int | None = getattr(train, "batch_size", None)

    @override
    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return self._train

    @override
    def val_dataloader(self) -> EVAL_DATALOADERS:
        return self._validation if self._validation is not None else []


def find_batch_size(owner: pl.LightningDataModule | pl.LightningModule) -> int | None:
    """The `batch_size` of an object or of its `hparams`; None if it has neither."""
    found = getattr(owner, "batch_size", None)
    if not isinstance(found, int):
        found = owner.hparams.get("batch_size")
    return found if isinstance(found, int) else None


def set_batch_size(owner: pl.LightningDataModule | pl.LightningModule, size: int) -> None:
    """Set the `batch_size` of an object and of its `hparams`, those that exist."""
    if isinstance(owner.hparams.get("batch_size"), int):
        owner.hparams["batch_size"] = size
    if isinstance(getattr(owner, "batch_size", None), int):
        with contextlib.suppress(AttributeError):  # a property, perhaps of the hparams
            owner.batch_size = size  # type: ignore[assignment]


def make_user_objects(config: RunConfig, micro_batch_size: int | None) -> UserObjects:
    """Create the objects that the config names, with the planned micro batch size or, if None, the data's own.

    Exceptions of the constructors are not changed.
    """
    model, data = make_objects(config, known_classes(config), micro_batch_size)
    precision, others = sort_plugins(make_plugins(config), "trainer.plugins")
    notice = optimizer_notice(model, config)
    notices = [] if notice is None else [notice]
    return UserObjects(model, data, make_callbacks(config), make_loggers(config), precision, notices, others)


def sort_plugins(plugins: Sequence[Any], field: str = "plugins") -> tuple[Precision | None, tuple[Any, ...]]:
    """Separate the precision plugin from the others: a CheckpointIO and a LayerSync.

    Raises:
        ConfigError: one is of another kind, or several are of one.
    """
    problems = [
        Problem(
            f"{field}[{n}]",
            f"given a {type(p).__name__}; expected a precision plugin, a CheckpointIO or a LayerSync, as the launcher "
            "creates the others",
        )
        for n, p in enumerate(plugins)
        if not isinstance(p, PLUGINS)
    ]
    problems += find_duplicate_plugins([type(p) for p in plugins], field)
    if problems:
        raise ConfigError(problems)
    precision = next((p for p in plugins if isinstance(p, Precision)), None)
    return precision, tuple(p for p in plugins if p is not precision)
