"""The user's classes: importing, checking and creating them from `class_path` and `init_args`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy

from launcher.config.schema import RunConfig
from launcher.config.suggestions import ClassFindings
from launcher.core.errors import ConfigError, Problem
from launcher.core.secrets import find_secrets, scrub
from launcher.user_code.arguments import (
    accepts_true,
    argument_names,
    argument_problems,
    make_arguments,
    make_object,
    read_argument,
)
from launcher.user_code.import_watch import find_class_paths, watch_imports
from launcher.user_code.imports import import_class
from launcher.user_code.optimizers import add_configure_optimizers, check_optimizers
from strategies.weight_callbacks import list_weight_callbacks

# The kinds of plugins that the user may give; the launcher creates the cluster environment.
PLUGINS = (Precision, CheckpointIO, LayerSync)


@dataclass(frozen=True)
class UserClasses:
    """The classes that a config names, imported and checked."""

    model: type[pl.LightningModule]
    data: type[pl.LightningDataModule] | None  # None if the model has its own loaders
    batch_size_of: str | None  # 'data' or 'model', the one that takes a `batch_size`; None if none does
    batch_size: int | None  # the value of that argument
    precision_plugin: type[Precision] | None = None
    callbacks: tuple[type[pl.Callback], ...] = ()

    def traits(self) -> dict[str, Any]:
        """Properties of the classes, as plain JSON values."""
        return {
            "model": name_of(self.model),
            "batch_size": self.batch_size,
            "static_graph": bool(getattr(self.model, "static_graph", False)),
            "precision_plugin": None if self.precision_plugin is None else name_of(self.precision_plugin),
            "weight_callbacks": list_weight_callbacks(self.callbacks),
        }


# The last config whose classes were imported and checked. One process may train several configs in turn.
_last: list[tuple[RunConfig, UserClasses]] = []


def known_classes(config: RunConfig) -> UserClasses:
    """The classes of a config that this process has just checked with `import_classes`; otherwise calls it."""
    return _last[0][1] if _last and _last[0][0] is config else import_classes(config)


def import_classes(config: RunConfig) -> UserClasses:
    """Import the classes that the config names and check their arguments, without creating an object.

    Raises:
        ConfigError: lists every class that does not import or is of the wrong kind, and every wrong argument.
    """
    _last.clear()
    found, problems = check_classes(config)
    if not config.model:
        text = "no model was given; add class_path, or start from load_config(), which has the demo"
        problems.append(Problem("model", text))
    if problems:
        raise ConfigError(problems)
    owner, batch_size = _find_batch_size(config, found)
    specs = _as_list(config.trainer.plugins)
    kinds = [import_class(spec["class_path"], PLUGINS, "trainer.plugins") for spec in specs]
    if duplicates := find_duplicate_plugins(kinds, "trainer.plugins"):
        raise ConfigError(duplicates)
    own = [kind for kind in kinds if issubclass(kind, Precision)]
    plugin, callbacks = own[0] if own else None, tuple(callback_classes(config))
    classes = UserClasses(found["model"], found.get("data"), owner, batch_size, plugin, callbacks)
    _last.append((config, classes))
    return classes


def check_classes(config: RunConfig) -> tuple[dict[str, type[Any]], list[Problem]]:
    """The classes of model, data and optimizers that can be imported, and every problem of the config's classes."""
    values = config.to_dict()
    with watch_imports(find_class_paths(values)):
        found, problems = _check_classes(config)
    secrets = find_secrets(values).values()
    return found, [Problem(each.path, scrub(each.message, secrets)) for each in problems]


def _check_classes(config: RunConfig) -> tuple[dict[str, type[Any]], list[Problem]]:
    problems: list[Problem] = []
    found: dict[str, type[Any]] = {}
    for key, base in (("model", pl.LightningModule), ("data", pl.LightningDataModule)):
        spec = getattr(config, key)
        if not spec:
            continue
        try:
            found[key] = import_class(spec["class_path"], base, f"{key}.class_path")
            problems += argument_problems(found[key], key, spec)
        except ConfigError as error:
            problems += error.problems
    for key, base in (("callbacks", pl.Callback), ("logger", Logger), ("plugins", PLUGINS)):
        problems += _list_problems(getattr(config.trainer, key), base, f"trainer.{key}")
    if isinstance(config.trainer.profiler, dict):
        problems += _class_problems(config.trainer.profiler, Profiler, "trainer.profiler")
    if config.ddp:
        problems += argument_problems(DDPStrategy, "ddp", {"dict_kwargs": config.ddp})
    optimizers, more = check_optimizers(config)
    return {**found, **optimizers}, problems + more


def inspect_classes(config: RunConfig) -> ClassFindings:
    """The problems of the classes that a config names, and the arguments of its model, data and optimizers."""
    found, problems = check_classes(config)
    flags = {f"{key}.init_args.{name}": accepts_true(cls, name)
             for key, cls in found.items() for name in argument_names(cls)
             if f"{key}.{name}" not in ("optimizer.params", "lr_scheduler.optimizer")}  # fmt: skip
    return ClassFindings(tuple(problems), flags)


def find_duplicate_plugins(kinds: Sequence[type[Any]], field: str) -> list[Problem]:
    """Problems with several plugins of a kind of which a run can have only one."""
    counts = {
        "precision plugins; a run has one precision": Precision,
        "CheckpointIO plugins; a run has one way to save": CheckpointIO,
        "LayerSync plugins; a run has one": LayerSync,
    }
    found = {text: sum(issubclass(kind, base) for kind in kinds) for text, base in counts.items()}
    return [Problem(field, f"given {count} {text}: keep one") for text, count in found.items() if count > 1]


def make_objects(
    config: RunConfig, classes: UserClasses, micro_batch_size: int | None
) -> tuple[pl.LightningModule, pl.LightningDataModule | None]:
    """Create the model and the data, with the planned micro batch as `batch_size` if one of them takes it.

    Exceptions of the constructors are not changed.
    """
    return make_model(config, classes, micro_batch_size), make_data(config, classes, micro_batch_size)


def make_model(config: RunConfig, classes: UserClasses, micro_batch_size: int | None) -> pl.LightningModule:
    """Create the model."""
    spec = _spec(config, classes, "model", micro_batch_size) or {}
    model = make_object(pl.LightningModule, spec, as_hyperparameters=True)
    add_configure_optimizers(model, config)
    return model


def make_data(config: RunConfig, classes: UserClasses, micro_batch_size: int | None) -> pl.LightningDataModule | None:
    """Create the data; None if the model has its own loaders."""
    spec = _spec(config, classes, "data", micro_batch_size)
    return make_object(pl.LightningDataModule, spec, as_hyperparameters=True) if spec else None


def _spec(config: RunConfig, classes: UserClasses, key: str, micro_batch_size: int | None) -> dict[str, Any] | None:
    """The config's spec of an object, with the planned micro batch if it takes `batch_size`."""
    spec: dict[str, Any] | None = getattr(config, key)
    if not spec or classes.batch_size_of != key or micro_batch_size is None:
        return spec
    return {**spec, "init_args": {**(spec.get("init_args") or {}), "batch_size": micro_batch_size}}


def make_callbacks(config: RunConfig) -> list[pl.Callback]:
    """The user's callbacks, in their order."""
    return [make_object(pl.Callback, spec) for spec in _as_list(config.trainer.callbacks)]


def callback_classes(config: RunConfig) -> list[type[pl.Callback]]:
    """The classes of the user's callbacks."""
    specs = _as_list(config.trainer.callbacks)
    return [import_class(spec["class_path"], pl.Callback, "trainer.callbacks") for spec in specs]


def make_loggers(config: RunConfig) -> list[Logger]:
    """The user's loggers, in addition to W&B."""
    return [make_object(Logger, spec) for spec in _as_list(config.trainer.logger)]


def make_plugins(config: RunConfig) -> list[Any]:
    """The user's plugins."""
    return [make_object(PLUGINS, spec) for spec in _as_list(config.trainer.plugins)]


def make_profiler(config: RunConfig) -> Profiler | str | None:
    """The profiler, or Lightning's name of one."""
    given = config.trainer.profiler
    return make_object(Profiler, given) if isinstance(given, dict) else given


def make_ddp_options(config: RunConfig) -> dict[str, Any]:
    """The user's arguments of Lightning's DDPStrategy, with functions and classes imported by their paths."""
    return make_arguments(DDPStrategy, config.ddp or {})


def name_of(cls: type[Any]) -> str:
    """The import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _as_list(value: bool | list[dict[str, Any]] | dict[str, Any] | None) -> list[dict[str, Any]]:
    """A list of specs; null and `logger: true` name no class."""
    return [] if value is None or isinstance(value, bool) else [value] if isinstance(value, dict) else value


def _list_problems(given: Any, base: type[Any] | tuple[type[Any], ...], path: str) -> list[Problem]:
    specs = enumerate(_as_list(given))
    return [problem for position, spec in specs for problem in _class_problems(spec, base, f"{path}[{position}]")]


def _class_problems(spec: Mapping[str, Any], base: type[Any] | tuple[type[Any], ...], field: str) -> list[Problem]:
    class_path = spec.get("class_path")
    if not isinstance(class_path, str) or not class_path:
        return [Problem(f"{field}.class_path", f"given {class_path!r}; expected an import path")]
    try:
        return argument_problems(import_class(class_path, base, f"{field}.class_path"), field, spec)
    except ConfigError as error:
        return list(error.problems)


def _find_batch_size(config: RunConfig, classes: Mapping[str, type[Any]]) -> tuple[str | None, int | None]:
    """Which class takes `batch_size`, Lightning's usual name for the micro batch, and its value."""
    for key in ("data", "model"):
        parameters = inspect.signature(classes[key].__init__).parameters if key in classes else {}
        if "batch_size" in parameters:
            given = parameters["batch_size"].default
            default = None if given is inspect.Parameter.empty else given
            value = read_argument(classes[key], getattr(config, key), "batch_size", default)
            return key, value if isinstance(value, int) else None
    return None, None
