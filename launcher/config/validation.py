"""Validation of a config's plain values: all problems at once, each with its field path."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from launcher.config import deepspeed_file as deepspeed_source
from launcher.config.fsdp_settings import find_fsdp_contradictions
from launcher.config.schema import FieldInfo, RunConfig, config_fields, field_hints
from launcher.config.suggestions import NO_COMMAND, CommandKeys, describe_group, describe_unknown_key
from launcher.config.synonyms import VALUES
from launcher.core.command_parser import suggest_choice
from launcher.core.errors import ConfigError, Problem
from launcher.core.nested import flatten
from launcher.core.secrets import redact
from strategies import precision as precision_names
from strategies.ddp import DDP_OPTIONS
from strategies.deepspeed_config import BESIDE_DEEPSPEED
from strategies.registry import describe_broken, find_requested, list_strategy_names


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Create a `RunConfig` from plain values.

    Raises:
        ConfigError: lists every unknown key, wrong type and invalid value.
    """
    problems = find_problems(values)
    if problems:
        raise ConfigError(problems)
    return build_record(RunConfig, values)


def find_problems(values: Mapping[str, Any], command: CommandKeys = NO_COMMAND) -> list[Problem]:
    """Every problem of the plain values of a config, in their order."""
    leaves = dict(config_fields())
    problems: list[Problem] = []
    groups = {path.rpartition(".")[0] for path in leaves} - {""}
    for path, value in flatten(values, groups.__contains__).items():
        if path in groups and (value is None or (isinstance(value, dict) and not value)):
            continue
        info = leaves.get(path)
        if info is None:
            problems.append(Problem(path, _unknown_key(path, value, leaves, command)))
        # jsonargparse accepts null for every type.
        elif (value is None and type(None) not in typing.get_args(info.hint)) or not _has_type(info.hint, value):
            close = suggest_choice(value, _list_choices(info.hint)) if isinstance(value, str) else ""
            if isinstance(value, str) and typing.get_origin(info.hint) is list:
                close = f"; write [{redact(value)}]"
            problems.append(Problem(path, f"given {redact(value)!r}; expected {_describe(info.hint)}{close}"))
        elif info.minimum is not None and not _in_range(_read(info.hint, value), info.minimum):
            finite = not isinstance(value, float) or math.isfinite(value)
            wanted = f"at least {info.minimum:g}" if finite else "a finite number"
            problems.append(Problem(path, f"given {value!r}; expected {wanted}"))
        elif path == deepspeed_source.FIELD:
            problems += deepspeed_source.deepspeed_problems(value)
        elif path in _CHECKS:
            problems += [Problem(path, message) for message in _CHECKS[path](value)]
    return [*problems, *_contradictions(values)]


def _contradictions(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that are valid alone but not together."""
    trainer, strategy = values.get("trainer"), find_requested(values.get("strategy"))
    yield from find_fsdp_contradictions(values, strategy)
    yield from _interval_problems(values.get("checkpoint"))
    if strategy is None:
        return
    if isinstance(trainer, Mapping) and trainer.get("plugins") and not strategy.accepts_precision_plugin:
        yield Problem("trainer.plugins", f"{BESIDE_DEEPSPEED}; remove it and set `precision`, or use `strategy: ddp`")
    if values.get("ddp") and not strategy.accepts_ddp_options:
        yield Problem("ddp", f"given, but the strategy is {strategy.name}; remove it, or use `strategy: ddp`")


def _interval_problems(given: Any) -> Iterator[Problem]:
    """Of several intervals between checkpoints, Lightning takes one."""
    names = ("every", "every_n_steps", "every_n_epochs")
    found = [name for name in names if isinstance(given, Mapping) and given.get(name) is not None]
    if len(found) > 1:
        keys = " and ".join(f"checkpoint.{name}" for name in found)
        yield Problem(f"checkpoint.{found[0]}", f"given {keys}; expected one of them, remove the other")


def find_name_problems(name: Any) -> Iterator[str]:
    """What is wrong with the name of a run: it is used for a folder, the W&B run and jobs."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        yield f"given {name!r}; expected up to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit"


def _precision_problems(precision: Any) -> Iterator[str]:
    try:
        if precision != precision_names.AUTO:
            precision_names.normalize_precision(precision)
    except precision_names.PrecisionError as error:
        yield f"{error}; or auto"


def _strategy_problems(strategy: Any) -> Iterator[str]:
    names = list_strategy_names()
    if strategy not in names:
        other = VALUES["strategy"].get(strategy)
        hint = f"; did you mean {other}?" if other else describe_broken(strategy) or suggest_choice(strategy, names)
        yield f"given {strategy!r}; expected one of {', '.join(names)}{hint}"


def _profiler_problems(profiler: Any) -> Iterator[str]:
    if isinstance(profiler, str) and profiler not in _PROFILERS:
        names = ", ".join(_PROFILERS)
        hint = suggest_choice(profiler, _PROFILERS)
        yield f"given {profiler!r}; expected one of {names}, or the class_path of a profiler{hint}"


def _share_problems(share: Any) -> Iterator[str]:
    # A quoted number is valid too.
    if not 0 < float(share) <= 1:
        yield f"given {share!r}; expected a share of each device's memory, more than 0 and at most 1, as in 0.92"


def _ddp_problems(options: Any) -> Iterator[str]:
    for key in options or {}:
        if key not in DDP_OPTIONS:
            yield f"unknown argument {key}; valid are {', '.join(DDP_OPTIONS)}"


# Lightning's own names.
_PROFILERS = ("simple", "advanced", "pytorch", "xla")
# Checks of fields whose type alone does not define the valid values.
_CHECKS: dict[str, Callable[[Any], Iterator[str]]] = {
    "name": find_name_problems,
    "precision": _precision_problems,
    "strategy": _strategy_problems,
    "trainer.profiler": _profiler_problems,
    "memory_share": _share_problems,
    "ddp": _ddp_problems,
}


def _unknown_key(path: str, value: Any, leaves: Mapping[str, FieldInfo], command: CommandKeys) -> str:
    if any(name.startswith(f"{path}.") for name in leaves):
        return describe_group(path, value, command)
    return describe_unknown_key(path, value, leaves, command)


@functools.cache
def _parser(hint: Any) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=hint)
    return parser


def _is_plainly(hint: Any, value: Any) -> bool:
    """Whether a value is of the type without conversion; a check by jsonargparse takes 8 ms per key."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_plainly(part, value) for part in typing.get_args(hint))
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in typing.get_args(hint))
    if origin is dict and type(value) is dict:
        key_hint, value_hint = typing.get_args(hint)
        return all(_is_plainly(key_hint, key) and _is_plainly(value_hint, each) for key, each in value.items())
    if origin is list and type(value) is list:
        return all(_is_plainly(typing.get_args(hint)[0], each) for each in value)
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


def _has_type(hint: Any, value: Any) -> bool:
    import jsonargparse

    if _is_plainly(hint, value):
        return True
    try:
        _read(hint, value)
    except (jsonargparse.ArgumentError, TypeError, ValueError):
        return False
    return True


def _read(hint: Any, value: Any) -> Any:
    """A value converted to its type; a quoted number becomes a number.

    Raises:
        jsonargparse.ArgumentError, TypeError, ValueError: it is not of that type.
    """
    if hint is float and type(value) is int:
        return float(value)
    if _is_plainly(hint, value):
        return copy.deepcopy(value)
    if _holds_anything(hint):
        # Arguments of classes are not converted: jsonargparse would create an object for every class_path.
        raise TypeError(f"{value!r} is no {hint}")
    return _parser(hint).parse_object({"it": value})["it"]


def _holds_anything(hint: Any) -> bool:
    return hint is Any or any(map(_holds_anything, typing.get_args(hint)))


def build_record(record: Any, values: Mapping[str, Any]) -> Any:
    """Create the record from valid values, one by one; jsonargparse takes 100 ms for all."""
    hints = field_hints(record)
    given: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            given[key] = build_record(hints[key], value or {})
        else:
            given[key] = _read(hints[key], value)
    return record(**given)


def _in_range(value: Any, minimum: float) -> bool:
    """Whether a number is finite and large enough; text and booleans always are."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number or minimum <= float(value) < math.inf


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
          dict: "a mapping", list: "a list"}  # fmt: skip


def _list_choices(hint: Any) -> Iterator[str]:
    """The names that a type hint allows."""
    if typing.get_origin(hint) is Literal:
        yield from map(str, typing.get_args(hint))
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):
        for part in typing.get_args(hint):
            yield from _list_choices(part)


def _describe(hint: Any) -> str:
    """A type hint as text for users of YAML."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        names = list(dict.fromkeys(_describe(part) for part in typing.get_args(hint)))
        return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else names[0]
    if origin is Literal:
        names = [str(each) for each in typing.get_args(hint)]
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    return _TYPE_NAMES.get(origin or hint, str(hint))
