"""Load a config from files (also LightningCLI's), dotted overrides and variables; without a source, the demo's."""

from __future__ import annotations

import ast
import copy
import functools
import importlib.resources
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.config.deepspeed_file import with_deepspeed_file
from launcher.config.lightning_cli import translate_lightning_cli
from launcher.config.merge import (
    CLASS_FIELDS,
    CLASS_LISTS,
    merge_values,
    set_path,
    with_class_specs,
    with_complete_lists,
)
from launcher.config.schema import RunConfig, config_fields
from launcher.config.trainer_variables import read_variables
from launcher.config.validation import find_problems, parse_config
from launcher.core.errors import ConfigError, Problem
from launcher.core.secrets import resolve_references
from launcher.core.yaml_loader import Loader

_FILES = (".yaml", ".yml", ".json")
# Parts of the config for which LightningCLI accepts a file.
_PARTS = (*CLASS_FIELDS, "trainer", *(f"trainer.{key}" for key in CLASS_LISTS))


def load_config(files: Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check a config.

    Args:
        files: YAML or JSON files; a later one overrides an earlier one, key by key.
        overrides: command line arguments such as `--trainer.max_epochs 3` or `--model.init_args.lr=1e-4`.

    Raises:
        ConfigError: every problem of every source at once.
    """
    return build_config(read_sources(files, overrides))


def read_sources(files: Iterable[str | Path] = (), overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and merge: normalized plain values, whose fields are not checked yet; `PL_TRAINER_*` come first.

    Raises:
        ConfigError: a source cannot be read or contradicts itself; lists the problems of the fields too.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    readers = [functools.partial(read_variables, os.environ),
               *(functools.partial(read_config_file, Path(file)) for file in files),
               functools.partial(parse_overrides, overrides)]  # fmt: skip
    strategy: Any = None
    for read in readers:
        try:
            raw = read()
            strategy = _complete_strategy(raw, strategy)
            source, contradictions = normalize_values(raw)
        except ConfigError as error:
            problems += error.problems
        else:
            problems += contradictions
            merge_values(values, source)
    if problems:
        raise ConfigError([*problems, *all_problems(values)])
    return values


def _complete_strategy(source: dict[str, Any], earlier: Any) -> Any:
    """Add the class of an earlier source to strategy arguments without a class; returns the last strategy."""
    trainer = source.get("trainer")
    if not isinstance(trainer, dict):
        return earlier
    given = trainer.get("strategy")
    if isinstance(given, dict) and "class_path" not in given and isinstance(earlier, dict):
        given = trainer["strategy"] = merge_values(copy.deepcopy(earlier), given)
    return earlier if given is None else given


def load_values(values: Mapping[str, Any]) -> RunConfig:
    """Check plain values as if read from one config file.

    Raises:
        ConfigError: every problem at once.
    """
    normal, problems = normalize_values(copy.deepcopy(dict(values)))
    if problems:
        raise ConfigError([*problems, *all_problems(normal)])
    return build_config(normal)


def build_config(values: dict[str, Any]) -> RunConfig:
    """The config of normalized values; without model and data, the demo's config with these values merged in.

    Raises:
        ConfigError: every problem at once.
    """
    if not values.get("model") and not values.get("data"):
        named = {key: value for key, value in values.items() if not (key in CLASS_FIELDS and value is None)}
        values = merge_values(read_preset("demo"), named)
    values, missing = resolve_references(with_complete_lists(values), os.environ)
    problems = [Problem(path, f"its value is a secret, which is not stored, and {name} is not set; set it, or give "
                        f"--{path} again") for path, name in missing.items()]  # fmt: skip
    problems += all_problems(values)
    if problems:
        raise ConfigError(problems)
    return with_deepspeed_file(parse_config(values))


def normalize_values(values: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """One source's values in the long form under the launcher's keys, and its contradictions."""
    return translate_lightning_cli(with_class_specs(values))


def all_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Every problem of normalized values that can be found without importing a class."""
    return [*find_problems(values), *_class_problems(values)]


def read_preset(name: str) -> dict[str, Any]:
    """The plain values of a config that ships with the launcher."""
    text = importlib.resources.files("launcher").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def read_config_file(path: Path) -> dict[str, Any]:
    """The plain values of one YAML or JSON file.

    Raises:
        ConfigError: no such file, unreadable, invalid (with the line), or no mapping.
    """
    values = read_plain_file(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([Problem(str(path), f"found {type(values).__name__}; expected a mapping of settings")])
    return {str(key): _read_part(each, path.parent, key) if key in _PARTS else each for key, each in values.items()}


def _read_part(given: Any, folder: Path, part: str) -> Any:
    """The content of the file for a file name, as in `model: model.yaml`; other values unchanged."""
    if isinstance(given, str) and given.endswith(_FILES):
        file = folder / given
        given, folder = read_plain_file(file), file.parent
    if part == "trainer" and isinstance(given, dict):
        return {key: _read_part(each, folder, key) if key in CLASS_LISTS else each for key, each in given.items()}
    return given


def read_plain_file(path: Path) -> Any:
    """The content of a YAML or JSON file.

    Raises:
        ConfigError: no such file, unreadable, or invalid (with the line).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([Problem(str(path), "no such file; `launcher fit --print-config` prints one")]) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read: {error}; give a text file that you may read"
        raise ConfigError([Problem(str(path), problem)]) from error
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader)  # noqa: S506 -- a SafeLoader
    except json.JSONDecodeError as error:
        problem = f"invalid JSON: {error.msg}; correct this line"
        raise ConfigError([Problem(f"{path}, line {error.lineno}", problem)]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        problem = f"invalid YAML: {error.problem or error.context}; correct this line"
        raise ConfigError([Problem(where, problem)]) from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a well-formed date or number that does not exist.
        raise ConfigError([Problem(str(path), f"invalid YAML: {error}; correct this value")]) from error


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Nested values of the arguments `--a.b value`, `--a.b=value` and `--flag`.

    Raises:
        ConfigError: an argument that is no option.
    """
    hints = {path: info.hint for path, info in config_fields()}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or len(argument) == 2:
            problems.append(Problem(argument, "not an option; give settings as --key value or --key=value"))
            continue
        key, equals, text = argument[2:].partition("=")
        path = path_of(key)
        if not equals:
            if position < len(arguments) and not arguments[position].startswith("--"):
                text = arguments[position]
                position += 1
            else:
                text = "true"
        value = _parse_value(text, hints.get(path))
        set_path(values, path.split("."), _read_part(value, Path(), path) if path in _PARTS else value)
    if problems:
        raise ConfigError(problems)
    return values


def path_of(key: str) -> str:
    """The dotted path of a command line key, whose first part may have dashes."""
    group, dot, rest = key.partition(".")
    return group.replace("-", "_") + dot + rest


def is_text(hint: Any) -> bool:
    """Whether a field takes only text, so that its value is not read as YAML."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return set(parts) <= {str, type(None)}


def _parse_value(text: str, hint: Any) -> Any:
    """A command line value read as YAML, unless the field takes only text."""
    if text != "null" and is_text(hint):
        return text
    try:
        return yaml.load(text, Loader)  # noqa: S506 -- a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text


def _class_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Problems of the class specs; nothing is imported."""
    problems: list[Problem] = []
    if values.get("data") and not values.get("model"):
        problems.append(Problem("model", "not given, but data is; add `model: {class_path: my_pkg.MyModule}`"))
    for key in CLASS_FIELDS:
        spec = values.get(key)
        if not isinstance(spec, dict) or not spec:
            continue
        path, arguments = spec.get("class_path"), spec.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            problems.append(Problem(f"{key}.init_args", f"given {arguments!r}; expected a mapping of arguments"))
        elif path is None:
            given = f"given arguments {', '.join(map(str, arguments))} without a class"
            problems.append(Problem(key, f"{given}; add class_path, or --{key} my_pkg.MyClass"))
        elif not _names_class(path, short=key not in ("model", "data")):
            problems.append(Problem(f"{key}.class_path", f"given {path!r}; {_suggest_import_path(path)}"))
    return problems


def _names_class(path: Any, *, short: bool) -> bool:
    """Whether a value looks like an import path; `short` allows a name without a module, as LightningCLI does."""
    return isinstance(path, str) and re.fullmatch(rf"[^\W\d]\w*(\.[^\W\d]\w*){'*' if short else '+'}", path) is not None


def _suggest_import_path(path: Any) -> str:
    """The advice for a value that is no import path."""
    if not isinstance(path, str) or not path.endswith(".py"):
        return "expected an import path like my_pkg.MyClass"
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        module = ".".join(file.absolute().relative_to(Path.cwd()).with_suffix("").parts)
    except (OSError, ValueError, SyntaxError):
        return "expected an import path like my_pkg.MyClass, not a file"
    return f"this is a file; give a class in it: {' or '.join(f'{module}.{name}' for name in classes or ['MyClass'])}"
