"""Check the arguments of a class that a config names, without creating an object, and create the object."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

from launcher.config.merge import FORMER
from launcher.config.synonyms import SAME_ARGUMENT
from launcher.core.errors import ConfigError, Problem
from launcher.user_code.import_watch import note_import
from launcher.user_code.imports import describe_import_error, import_class

# Creates a model from the hyperparameters in a checkpoint; LightningCLI's own, which supports nested classes.
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def argument_problems(
    cls: type[Any], key: str, spec: Mapping[str, Any], skip: Collection[str] = frozenset()
) -> list[Problem]:
    """Check each argument separately and report all invalid ones together.

    Args:
        cls: the class.
        key: the spec's path in the config.
        spec: `class_path`, `init_args`, `dict_kwargs`.
        skip: arguments that the config does not give.
    """
    for name in ("init_args", "dict_kwargs"):
        if not isinstance(spec.get(name) or {}, Mapping):
            return [Problem(f"{key}.{name}", f"given {spec[name]!r}; expected a mapping of arguments")]
    note_import(f"the classes in the arguments of {cls.__name__}")
    parser = _parser(cls, frozenset(skip))
    known = _known(cls, skip)
    given, more = _split(spec, known)
    other_place = "; for its **kwargs, give it under dict_kwargs" if _takes_anything(cls) else ""
    problems: list[Problem] = []
    for name, value in given.items():
        path = f"{key}.init_args.{name}"
        if name not in known:
            problems.append(Problem(path, f"{cls.__name__} takes no {name}; {_did_you_mean(name, known)}{other_place}"))
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
            if detail := _errors_of(name, str(error)):
                problems.append(Problem(path, f"given {value!r}; {detail}"))
        except SystemExit as error:
            # The module of a nested class ends the process on import.
            cause = f"its module does not import: {describe_import_error(error)}"
            problems.append(Problem(path, f"given {value!r}; {cause}; correct the module, or give another path"))
    if not _takes_anything(cls):
        problems += [
            Problem(f"{key}.dict_kwargs.{name}", f"{cls.__name__} takes no {name}; {_did_you_mean(name, known)}")
            for name in more
        ]
    missing = sorted(_required(cls) - set(given) - set(more) - set(skip))
    problems += [
        Problem(f"{key}.init_args.{name}", f"{cls.__name__} needs it, and it was not given; add it") for name in missing
    ]
    return problems


def _errors_of(name: str, error: str) -> str:
    """The part of a parser's error that is about this argument; it may also list other required arguments."""
    first, *more = [line.strip() for line in error.splitlines() if line.strip()]
    keys = re.findall(rf"\bit\.({re.escape(name)}(?:\.\w+)*)(?!\w)", first)
    if "arguments are required" in first:
        return f"{', '.join(keys)} is required and was not given; add it" if keys else ""
    return " ".join(more) or first if keys else ""


def read_argument(cls: type[Any], spec: Mapping[str, Any], name: str, default: Any) -> Any:
    """One argument of a valid spec, converted to its type, so a quoted number is a number; `default` if not given."""
    given, _ = _split(spec, _known(cls))
    if name not in given:
        return default
    # With all arguments, as the parser requires some of them.
    return vars(_parser(cls, frozenset()).parse_object({"it": given}, defaults=False)["it"])[name]


def make_object(
    base: type[Any] | tuple[type[Any], ...], spec: Mapping[str, Any], *, as_hyperparameters: bool = False
) -> Any:
    """Create an object, nested `class_path`s first; exceptions of its constructor are not changed.

    With `as_hyperparameters`, if a setting is not a plain value, `save_hyperparameters` saves the settings, as under
    LightningCLI, not the objects created from them, so that the checkpoint can be read again. Otherwise it saves the
    same as in a script, including arguments of the base classes' constructors.
    """
    cls = import_class(spec["class_path"], base, "class_path")
    given, more = _split(spec, _known(cls))
    parser = _parser(cls, frozenset())
    parsed = parser.parse_object({"it": given})
    arguments = parser.instantiate(parsed).get("it") or {}
    values = vars(parsed.get("it", jsonargparse.Namespace()))
    saved = contextlib.nullcontext()
    if as_hyperparameters and not all(map(_is_plain, values.values())):
        settings = _settings(parser, values)
        saved = _given_hyperparameters_context({"_class_path": spec["class_path"], **settings, **more}, _INSTANTIATOR)
    with saved:
        return cls(**dict(vars(arguments) if arguments else {}), **more)


def _is_plain(value: Any) -> bool:
    """Whether a setting is saved unchanged in a checkpoint."""
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list):
        return type(value) is list and all(map(_is_plain, value))
    return type(value) in (type(None), bool, int, float, str)


def _settings(parser: jsonargparse.ArgumentParser, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in the form of a config file; objects that have no such form, such as some defaults, unchanged."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if _is_plain(value):
            found[name] = value
            continue
        try:
            alone = jsonargparse.Namespace(it=jsonargparse.Namespace(**{name: value}))
            text = parser.dump(alone, skip_unset=False, skip_validation=True)
            found[name] = yaml.safe_load(text)["it"][name]
        except yaml.YAMLError:
            found[name] = value
    return found


def make_arguments(cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a class, without creating it: import paths and nested classes become the objects that they name."""
    if not given:
        return {}
    known, more = _split({"dict_kwargs": given}, _known(cls))
    parser = _parser(cls, frozenset())
    parsed = parser.parse_object({"it": known}, defaults=False)
    made = parser.instantiate(parsed).get("it")
    return {**{name: vars(made)[name] for name in known}, **more}


def plain_arguments(cls: type[Any], spec: Mapping[str, Any], skip: Collection[str]) -> dict[str, Any]:
    """All arguments but `skip`, with defaults, converted to their types; no objects are created from them."""
    given, more = _split(spec, _known(cls, skip))
    found = _parser(cls, frozenset(skip)).parse_object({"it": given}).get("it")
    return {**(found.as_dict() if found else {}), **more}


def _split(spec: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments in the signature, and those that only its `**kwargs` accept."""
    more = dict(spec.get("dict_kwargs") or {})
    given = {name: more.pop(name) for name in [*more] if name in known}
    former = {name: value for name, value in (spec.get(FORMER) or {}).items() if name in known and name not in more}
    return {k: _merge_former(v) for k, v in {**former, **given, **(spec.get("init_args") or {})}.items()}, more


def _merge_former(value: Any) -> Any:
    """Add to nested specs those arguments of a replaced class that the new class accepts too."""
    if isinstance(value, list | tuple):
        return [_merge_former(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if FORMER not in value or "class_path" not in value:
        return {key: _merge_former(each) for key, each in value.items()}
    try:
        cls = import_class(str(value["class_path"]), object, "class_path")
    except ConfigError:
        known: frozenset[str] = frozenset()  # reported when the object is created
    else:
        known = _known(cls)
    own = {key: each for key, each in value.items() if key not in (FORMER, "init_args")}
    return {**own, "init_args": _split({**value, "dict_kwargs": None}, known)[0]}


def _did_you_mean(name: str, known: Collection[str]) -> str:
    """The most similar argument, otherwise all arguments."""
    same = [each for group in SAME_ARGUMENT if name in group for each in group if each in known]
    close = same or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"it takes {', '.join(sorted(known)) or 'no arguments'}"


@functools.lru_cache(maxsize=64)
def _parser(cls: type[Any], skip: frozenset[str]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    # No group: jsonargparse creates the arguments' objects only, not the object itself.
    parser.add_class_arguments(cls, "it", fail_untyped=False, skip=set(skip), as_group=False)
    return parser


def _known(cls: type[Any], skip: Collection[str] = frozenset()) -> frozenset[str]:
    return _known_without(cls, frozenset(skip))


@functools.lru_cache(maxsize=64)
def _known_without(cls: type[Any], skip: frozenset[str]) -> frozenset[str]:
    return frozenset(vars(_parser(cls, skip).get_defaults().get("it", jsonargparse.Namespace())))


def argument_names(cls: type[Any]) -> list[str]:
    """The names of a class's arguments, in its order."""
    known = _known(cls)
    own = [parameter.name for parameter in _own_parameters(cls) if parameter.name in known]
    return [*own, *sorted(known - set(own))]


def accepts_true(cls: type[Any], name: str) -> bool:
    """Whether an argument is a flag: one that accepts a boolean, or anything."""
    parameter = inspect.signature(cls.__init__).parameters.get(name)
    if parameter is None:
        return True
    if parameter.annotation is parameter.empty:
        return parameter.default is None or parameter.default is parameter.empty or isinstance(parameter.default, bool)
    hint = _hint_of(cls, name)
    return hint in (Any, object, bool, None) or bool in typing.get_args(hint)


def _hint_of(cls: type[Any], name: str) -> Any:
    """The type of an argument; None for one that only a type checker can read."""
    try:
        return typing.get_type_hints(cls.__init__)[name]
    except (NameError, TypeError, KeyError):
        return None


def _takes_null(cls: type[Any], name: str) -> bool:
    """Whether the argument accepts null; one without a type hint accepts anything."""
    parameter = inspect.signature(cls.__init__).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty or parameter.default is None:
        return True
    hint = _hint_of(cls, name)
    return hint in (Any, object, None, type(None)) or type(None) in typing.get_args(hint)


def _own_parameters(cls: type[Any]) -> list[inspect.Parameter]:
    """The parameters without the first one, `self`."""
    return list(inspect.signature(cls.__init__).parameters.values())[1:]


def _takes_anything(cls: type[Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _own_parameters(cls))


def _required(cls: type[Any]) -> set[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in _own_parameters(cls) if p.default is p.empty and p.kind in kinds}
