"""The user's own classes: imported, checked and made from `class_path` and `init_args`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse
import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision

from launcher.config import RunConfig
from launcher.errors import ConfigError, Problem

# The plugins that may be the user's own; the launcher makes the environment of the ranks.
PLUGINS = (Precision, CheckpointIO, LayerSync)


@dataclass(frozen=True)
class UserClasses:
    """The classes that a config names, importable and of the right kind.

    Attributes:
        model: the LightningModule's class.
        data: the LightningDataModule's class, None if the model has loaders of its own.
        batch_size_of: 'data' or 'model', whichever takes a `batch_size`; None if none does.
        batch_size: that argument's value.
        precision_plugin: class of the user's own precision plugin, None without one.
    """

    model: type[pl.LightningModule]
    data: type[pl.LightningDataModule] | None
    batch_size_of: str | None
    batch_size: int | None
    precision_plugin: type[Precision] | None = None

    def traits(self) -> dict[str, Any]:
        """What the classes say of themselves, as plain JSON values."""
        return {
            "model": name_of(self.model),
            "batch_size": self.batch_size,
            "static_graph": bool(getattr(self.model, "static_graph", False)),
            "precision_plugin": None if self.precision_plugin is None else name_of(self.precision_plugin),
        }


def import_classes(config: RunConfig) -> UserClasses:
    """Import what the config names and check the arguments, without making an object.

    Raises:
        ConfigError: lists every class that does not import or is of the wrong kind, and every wrong argument.
    """
    problems: list[Problem] = []
    found: dict[str, type[Any]] = {}
    for key, base in (("model", pl.LightningModule), ("data", pl.LightningDataModule)):
        spec = getattr(config, key)
        if not spec:
            continue
        try:
            found[key] = _import(spec["class_path"], base, f"{key}.class_path")
            problems += _argument_problems(found[key], key, spec)
        except ConfigError as error:
            problems += error.problems
    for key, base in (("callbacks", pl.Callback), ("logger", Logger), ("plugins", PLUGINS)):
        problems += _list_problems(getattr(config.trainer, key), base, f"trainer.{key}")
    plugins = _as_list(config.trainer.plugins)
    if not config.model:
        problems.append(
            Problem("model", "no model was given; add class_path, or start from load_config(), which has the demo")
        )
    if problems:
        raise ConfigError(problems)
    owner, batch_size = _find_batch_size(config, found)
    kinds = [_import(spec["class_path"], PLUGINS, "trainer.plugins") for spec in plugins]
    doubled = doubled_plugins(kinds, "trainer.plugins")
    if doubled:
        raise ConfigError(doubled)
    own = [kind for kind in kinds if issubclass(kind, Precision)]
    return UserClasses(found["model"], found.get("data"), owner, batch_size, own[0] if own else None)


def doubled_plugins(kinds: Sequence[type[Any]], field: str) -> list[Problem]:
    """What to tell of plugins of which a run has one and several were given."""
    counts = {
        "precision plugins; a run has one precision": Precision,
        "CheckpointIO plugins; a run has one way to save": CheckpointIO,
        "LayerSync plugins; a run has one": LayerSync,
    }
    found = {text: sum(issubclass(kind, base) for kind in kinds) for text, base in counts.items()}
    return [Problem(field, f"given {count} {text}") for text, count in found.items() if count > 1]


def make_objects(
    config: RunConfig, classes: UserClasses, micro_batch_size: int | None
) -> tuple[pl.LightningModule, pl.LightningDataModule | None]:
    """Make the model and the data; the planned micro batch goes in where a `batch_size` is taken.

    Whatever the constructors raise comes out as it is.
    """
    return make_model(config, classes, micro_batch_size), make_data(config, classes, micro_batch_size)


def make_model(config: RunConfig, classes: UserClasses, micro_batch_size: int | None) -> pl.LightningModule:
    """The model alone."""
    return _instantiate(pl.LightningModule, _spec(config, classes, "model", micro_batch_size) or {})


def make_data(config: RunConfig, classes: UserClasses, micro_batch_size: int | None) -> pl.LightningDataModule | None:
    """The data alone; None if the model has loaders of its own."""
    spec = _spec(config, classes, "data", micro_batch_size)
    return _instantiate(pl.LightningDataModule, spec) if spec else None


def _spec(config: RunConfig, classes: UserClasses, key: str, micro_batch_size: int | None) -> dict[str, Any] | None:
    """What the config says of an object, with the planned micro batch if it is the one that takes it."""
    spec: dict[str, Any] | None = getattr(config, key)
    if not spec or classes.batch_size_of != key or micro_batch_size is None:
        return spec
    return {**spec, "init_args": {**(spec.get("init_args") or {}), "batch_size": micro_batch_size}}


def make_callbacks(config: RunConfig) -> list[pl.Callback]:
    """The user's own callbacks, in their order."""
    return [_instantiate(pl.Callback, spec) for spec in _as_list(config.trainer.callbacks)]


def make_loggers(config: RunConfig) -> list[Logger]:
    """The user's own loggers, beside W&B."""
    return [_instantiate(Logger, spec) for spec in _as_list(config.trainer.logger)]


def make_plugins(config: RunConfig) -> list[Any]:
    """The user's own plugins."""
    return [_instantiate(PLUGINS, spec) for spec in _as_list(config.trainer.plugins)]


def name_of(cls: type[Any]) -> str:
    """Where a class is imported from."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _as_list(value: list[dict[str, Any]] | dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if value is None else [value] if isinstance(value, dict) else value


def _import(path: str, base: type[Any] | tuple[type[Any], ...], field: str) -> type[Any]:
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # The user's module may raise anything; the last line is what it says.
        last = traceback.format_exception_only(error)[-1].strip()
        own = _place(error)
        raise ConfigError(
            [Problem(field, f"{path} does not import: {last}{own}; mend that, or give another path")]
        ) from error
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(
            [Problem(field, f"module {module_name} has no {name}; it lies in {module.__file__}: correct the name")]
        )
    if not (inspect.isclass(found) and issubclass(found, base)):
        wanted = " or ".join(each.__name__ for each in (base if isinstance(base, tuple) else (base,)))
        raise ConfigError([Problem(field, f"{path} is no {wanted}; it is {_what(found)}: give a {wanted}")])
    return found


def _place(error: BaseException) -> str:
    """Where in the user's code it happened, as ' (file, line n)'."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    while isinstance(error, SystemExit) and len(frames) > 1 and frames[-1].name == "exit":
        # W&B, and whoever else, puts a function of its own in the place of sys.exit.
        frames.pop()
    where = frames[-1]
    return "" if where.filename.startswith("<frozen") else f" ({where.filename}, line {where.lineno})"


def _what(found: Any) -> str:
    if inspect.isclass(found):
        return (
            "a class of " + ", ".join(b.__name__ for b in found.__mro__[1:-1])
            if len(found.__mro__) > 2
            else "a bare class"
        )
    return f"a {type(found).__name__}"


def _argument_problems(cls: type[Any], key: str, spec: Mapping[str, Any]) -> list[Problem]:
    """Each argument by itself, so that all wrong ones are told at once."""
    given = spec.get("init_args") or {}
    if not isinstance(given, Mapping):
        return [Problem(f"{key}.init_args", f"given {given!r}; expected a mapping of arguments")]
    parser = _class_parser(cls)
    known = set(vars(parser.get_defaults().get("it", jsonargparse.Namespace())))
    problems: list[Problem] = []
    for name, value in given.items():
        path = f"{key}.init_args.{name}"
        if name not in known:
            close = _did_you_mean(name, known)
            problems.append(Problem(path, f"{cls.__name__} takes no {name}; {close}"))
            continue
        if name == "batch_size" and isinstance(value, int) and value < 1:
            problems.append(Problem(path, f"given {value!r}; expected at least 1"))
            continue
        if value is None and not _takes_null(cls, name):
            problems.append(Problem(path, f"given null; {cls.__name__} expects a value, so give one"))
            continue
        try:
            parser.parse_object({"it": {name: value}}, defaults=False)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            # Other arguments may be required and are not given in this look at one.
            if name in str(error).splitlines()[0]:
                detail = " ".join(line.strip() for line in str(error).splitlines()[1:] if line.strip())
                problems.append(Problem(path, f"given {value!r}; {detail or error}"))
    missing = sorted(_required(cls) - set(given))
    problems += [
        Problem(f"{key}.init_args.{name}", f"{cls.__name__} needs it, and it was not given; add it") for name in missing
    ]
    return problems


def _did_you_mean(name: str, known: set[str]) -> str:
    """A 'did you mean' for an argument's name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(known)) or 'no arguments'}"


def _class_parser(cls: type[Any]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", fail_untyped=False)
    return parser


def _takes_null(cls: type[Any], name: str) -> bool:
    """Whether null may be meant; an argument without a type hint may mean anything."""
    parameter = inspect.signature(cls.__init__).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty or parameter.default is None:
        return True
    try:
        hint = typing.get_type_hints(cls.__init__)[name]
    except (NameError, TypeError, KeyError):
        return True  # a hint that only a type checker can read
    return hint in (Any, object, type(None)) or type(None) in typing.get_args(hint)


def _required(cls: type[Any]) -> set[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.default is p.empty and p.kind in kinds and p.name != "self"}


def _list_problems(given: Any, base: type[Any] | tuple[type[Any], ...], path: str) -> list[Problem]:
    problems: list[Problem] = []
    for position, spec in enumerate(_as_list(given)):
        field = f"{path}[{position}]"
        class_path = spec.get("class_path")
        if not isinstance(class_path, str) or "." not in class_path:
            problems.append(Problem(f"{field}.class_path", f"given {class_path!r}; expected an import path"))
            continue
        try:
            problems += _argument_problems(_import(class_path, base, f"{field}.class_path"), field, spec)
        except ConfigError as error:
            problems += error.problems
    return problems


def _find_batch_size(config: RunConfig, classes: Mapping[str, type[Any]]) -> tuple[str | None, int | None]:
    """Which class takes `batch_size`, and what it would get: Lightning's own name for the micro batch."""
    for key in ("data", "model"):
        if key not in classes:
            continue
        parameter = inspect.signature(classes[key].__init__).parameters.get("batch_size")
        if parameter is None:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        value = (getattr(config, key).get("init_args") or {}).get("batch_size", default)
        return key, value if isinstance(value, int) else None
    return None, None


def _instantiate(base: type[Any] | tuple[type[Any], ...], spec: Mapping[str, Any]) -> Any:
    """The object, nested `class_path`s made first; what its constructor raises comes out as it is."""
    cls = _import(spec["class_path"], base, "class_path")
    parser = _class_parser(cls)
    parsed = parser.parse_object({"it": dict(spec.get("init_args") or {})})
    arguments = parser.instantiate(parsed, instantiate_groups=False).get("it") or {}
    return cls(**dict(vars(arguments) if arguments else {}), **(spec.get("dict_kwargs") or {}))
