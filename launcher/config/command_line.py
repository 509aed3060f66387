"""Settings on the command line: `--a.b value`, `--a.b=value`, and `--flag` for a setting that takes true or false."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from launcher.config.config_file import read_part
from launcher.config.merge import CLASS_FIELDS, find_lost_values, set_path
from launcher.config.schema import config_fields
from launcher.config.suggestions import NO_COMMAND, CommandKeys, describe_group, describe_unknown_option
from launcher.core.errors import ConfigError, Problem
from launcher.core.yaml_loader import Loader

# Keys of LightningCLI that need a value, with the setting that each of them sets.
_TRANSLATED = {
    "ckpt_path": "resume",
    **{f"trainer.{key}": key for key in ("accelerator", "devices", "num_nodes", "precision", "strategy")},
}


@dataclass(frozen=True, slots=True)
class TypedArgument:
    """One argument of the command line with its value.

    Attributes:
        path: the dotted path of a setting; None if this is no option.
        text: the value, or the argument itself if it is no setting; None for a setting without a value.
        value: the value of an option with one dash, such as `-n`.
    """

    path: str | None
    text: str | None
    value: str | None = None


def split_arguments(arguments: Sequence[str]) -> Iterator[TypedArgument]:
    """The arguments with their values, in their order."""
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--") or len(argument) == 2:
            has_value = argument[:1] == "-" and position < len(arguments) and not arguments[position].startswith("-")
            yield TypedArgument(None, argument, arguments[position] if has_value else None)
            position += has_value
            continue
        key, equals, text = argument[2:].partition("=")
        if equals:
            yield TypedArgument(path_of(key), text)
        elif position < len(arguments) and not arguments[position].startswith("--"):
            yield TypedArgument(path_of(key), arguments[position])
            position += 1
        else:
            yield TypedArgument(path_of(key), None)


def read_overrides(arguments: Sequence[str], command: CommandKeys = NO_COMMAND) -> tuple[dict[str, Any], list[Problem]]:
    """Nested values of the settings, and a problem for each argument that is none or lacks its value."""
    hints = {path: info.hint for path, info in config_fields()}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for argument in split_arguments(arguments):
        path, text = argument.path, argument.text
        if path is None:
            problems.append(Problem(str(text), describe_unknown_option(str(text), argument.value, command)))
        elif (text is None and not _takes_true(path, hints)) or (
            text == "" and path in hints and not is_text(hints[path])
        ):
            problems.append(Problem(path, _describe_missing_value(path, hints)))
        else:
            value = True if text is None else _parse_value(text, hints.get(path))
            group, dot, _ = path.partition(".")
            problems += describe_lost_values(values, {group: {}} if dot else {}, command)
            try:
                set_path(values, path.split("."), read_part(value, Path(), path))
            except ConfigError as error:
                problems += error.problems
    return values, problems


def describe_lost_values(
    base: Mapping[str, Any], over: Mapping[str, Any], command: CommandKeys = NO_COMMAND
) -> list[Problem]:
    """The problem of each value in place of a group of settings, one of which `over` sets."""
    groups = {path.partition(".")[0] for path, _ in config_fields() if "." in path}
    lost = find_lost_values(base, over, groups)
    return [Problem(path, describe_group(path, value, command)) for path, value in lost.items()]


def find_class_flags(arguments: Sequence[str]) -> Iterator[str]:
    """The classes' arguments that are given without a value; only the class knows whether it accepts `true`."""
    for each in split_arguments(arguments):
        group, dot, name = (each.path or "").partition(".")
        if each.text is None and dot and group in CLASS_FIELDS:
            yield f"{group}.init_args.{name.removeprefix('init_args.')}"


def path_of(key: str) -> str:
    """The dotted path of a command line key, whose first part may have dashes."""
    group, dot, rest = key.partition(".")
    return group.replace("-", "_") + dot + rest


def is_text(hint: Any) -> bool:
    """Whether a field takes only text, so that its value is not read as YAML."""
    return set(_parts(hint)) <= {str, type(None)}


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _takes_true(path: str, hints: dict[str, Any]) -> bool:
    """Whether `--path` alone is valid, as `true`; unknown settings are reported elsewhere."""
    if path in CLASS_FIELDS or path.endswith((".class_path", ".init_args", ".dict_kwargs")):
        return False
    if any(known.startswith(f"{path}.") for known in hints):
        return False
    hint = hints.get(_TRANSLATED.get(path, path))
    if hint is None:
        return True
    values = [value for part in _parts(hint) if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    return bool in _parts(hint) or True in values


def _describe_missing_value(path: str, hints: Iterable[str]) -> str:
    below = next((known for known in hints if known.startswith(f"{path}.")), None)
    if below is not None:
        return f"a group of settings, given without a value; write one of them, as in --{below} VALUE"
    return f"given without a value; write --{path} VALUE"


def _parse_value(text: str, hint: Any) -> Any:
    """A command line value read as YAML, unless the field takes only text."""
    if text != "null" and is_text(hint):
        return text
    try:
        return yaml.load(text, Loader)  # noqa: S506 -- a SafeLoader
    except (yaml.YAMLError, ValueError):
        return text
