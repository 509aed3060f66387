"""Merge the settings of several sources, with class specs in their long form."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# Fields that name a class, and those of `trainer` that name several.
CLASS_FIELDS = ("model", "data", "optimizer", "lr_scheduler")
CLASS_LISTS = ("callbacks", "logger", "plugins")
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
# Arguments of a class that a later source has replaced; the new class gets those that it accepts too.
FORMER = "former_args"
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_OLD_PATH = re.compile(r"pytorch_lightning(\.\w+)+")


def set_path(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a value at a dotted path, in place.

    `model` may be a class name or a mapping; settings of `trainer.callbacks` belong to the last callback.
    """
    place = values
    for key in keys[:-1]:
        name = f"{key}+" if place.get(f"{key}+") else key
        below = {"class_path": place[name]} if isinstance(place.get(name), str) else place.get(name)
        place[name] = below if isinstance(below, dict | list) else {}
        place = place[name]
        if isinstance(place, list):
            if not place:
                place.append({})
            place[-1] = place[-1] if isinstance(place[-1], dict) else {"class_path": place[-1]}
            place = place[-1]
    last = keys[-1]
    depth = 2 if keys[0] in CLASS_FIELDS else 3
    appends = appended_to(last) != last and appended_to(last) not in (*place, *CLASS_LISTS)
    if isinstance(value, str) and isinstance(place.get(last), dict) and last in CLASS_FIELDS:
        place[last]["class_path"] = value
    elif ("class_path" in place and last not in _CLASS_KEYS and len(keys) > depth) or (appends and len(keys) == depth):
        place["init_args"] = dict(place.get("init_args") or {})
        _put(place["init_args"], last, value)
    else:
        _put(place, last, value)


def _put(place: dict[str, Any], key: str, value: Any) -> None:
    """Set a value, or append it; if this source does not set the list, `key+` is kept."""
    name = appended_to(key)
    if name == key:
        place.pop(f"{key}+", None)
        place[key] = value
    elif name in place and name not in CLASS_LISTS:
        place[name] = [*as_list(place[name]), *as_list(value)]
    else:
        place[key] = [*as_list(place.get(key)), *as_list(value)]


def merge_values(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`, in place, as LightningCLI does.

    A new class keeps the earlier arguments that it accepts, which is decided when it is imported. `callbacks+` appends
    to `callbacks`, and `key+` to any list. Settings without a class belong to the last class of several.
    """
    for key, value in over.items():
        name = appended_to(key)
        below = base.get(name)
        if name != key and name in CLASS_LISTS:
            base[name] = [*as_list(below), *copy.deepcopy(as_list(value))]
        elif name != key and (name in base or key in base):
            _put(base, key, copy.deepcopy(value))
        elif name in CLASS_LISTS and isinstance(below, list) and below and _is_part(value):
            below[-1] = _spec(below[-1])
            merge_values(below[-1], _spec(dict(value)))
        elif isinstance(below, str) and _is_part(value) and {*value} <= {*_CLASS_KEYS}:
            base[key] = {"class_path": below, **copy.deepcopy(dict(value))}
        elif isinstance(below, dict) and "class_path" in below:
            base[key] = _merged_class(below, value)
        elif isinstance(value, Mapping):
            base[key] = merge_values(below if isinstance(below, dict) else {}, value)
        else:
            base[key] = copy.deepcopy(value)
        if name == key:
            base.pop(f"{key}+", None)
    return base


def find_lost_values(base: Mapping[str, Any], over: Mapping[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """Path to value of what `base` has in place of a group of settings or a class, where `over` sets one of it.

    A merge would replace such a value without a message.
    """
    lost: dict[str, Any] = {}
    for key in (key for key in (*groups, *CLASS_FIELDS) if isinstance(over.get(key), Mapping)):
        below = base.get(key)
        if below is not None and not isinstance(below, Mapping | str if key in CLASS_FIELDS else Mapping):
            lost[key] = below
        elif isinstance(below, Mapping) and key in CLASS_FIELDS and isinstance(over[key].get("init_args"), Mapping):
            arguments = below.get("init_args")
            if arguments is not None and not isinstance(arguments, Mapping):
                lost[f"{key}.init_args"] = arguments
    return lost


def _is_part(value: Any) -> bool:
    """Whether these are settings of a class that another source names."""
    return isinstance(value, Mapping) and "class_path" not in value


def _merged_class(below: dict[str, Any], value: Any) -> Any:
    """A class spec merged with another one, a part of one, or a class name."""
    if isinstance(value, str) and _IMPORT_PATH.fullmatch(value):
        value = {"class_path": value}
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    over = copy.deepcopy(_spec(dict(value)))
    if over.get("class_path", below["class_path"]) == below["class_path"]:
        return merge_values(below, {k: v for k, v in over.items() if k != "class_path"})
    former = {**(below.get(FORMER) or {}), **(below.get("init_args") or {})}
    return {**over, FORMER: former} if former else over


def with_complete_lists(value: Any) -> Any:
    """A copy in which `key+` of a class's arguments becomes `key`, since no source has set that list."""
    if isinstance(value, list):
        return [with_complete_lists(each) for each in value]
    if not isinstance(value, dict):
        return value
    result = {key: with_complete_lists(each) for key, each in value.items()}
    for part in ("init_args", FORMER):
        if isinstance(given := result.get(part), dict):
            result[part] = {}
            for key, each in given.items():
                name = appended_to(key)
                _put(result[part], name, each if name == key else [*as_list(given.get(name)), *as_list(each)])
    return result


def with_class_specs(values: dict[str, Any]) -> dict[str, Any]:
    """A copy with `model: pkg.Class` and `model: {lr: 1}` in the form `class_path` and `init_args`; others likewise."""
    result = _current_paths(values)
    for key in CLASS_FIELDS:
        if key in result:
            result[key] = _spec(result[key])
    trainer = result.get("trainer")
    if isinstance(trainer, dict):
        for key in [*trainer]:
            if str(key).removesuffix("+") in CLASS_LISTS:
                trainer[key] = _spec(trainer[key])
        profiler = trainer.get("profiler")
        if isinstance(profiler, dict) or (isinstance(profiler, str) and profiler.endswith("Profiler")):
            trainer["profiler"] = _spec(profiler)
    return result


def _spec(given: Any) -> Any:
    """One class or each of several in the long form; other values are left to the validation."""
    if isinstance(given, list):
        return [_spec(each) for each in given]
    if isinstance(given, str):
        return {"class_path": given}
    if not isinstance(given, dict):
        return given
    own = {k: v for k, v in given.items() if k in (*_CLASS_KEYS, FORMER)}
    arguments = {k: v for k, v in given.items() if k not in own}
    inner = own.get("init_args") or {}
    # Values that are no mapping are left to the validation.
    if arguments and isinstance(inner, Mapping):
        own["init_args"] = dict(inner)
        for key, value in arguments.items():
            _put(own["init_args"], key, value)
    return own


def _current_paths(value: Any) -> Any:
    """A copy with `lightning.pytorch` in the import paths of Lightning's classes instead of `pytorch_lightning`."""
    if isinstance(value, dict):
        return {key: _current_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_current_paths(each) for each in value]
    if isinstance(value, str) and _OLD_PATH.fullmatch(value):
        return "lightning.pytorch" + value.removeprefix("pytorch_lightning")
    return value


def appended_to(key: Any) -> Any:
    """The name of the list that `key+` appends to; other keys unchanged."""
    return key.removesuffix("+") if isinstance(key, str) else key


def as_list(value: Any) -> list[Any]:
    """A list of one or several values; empty for None."""
    return value if isinstance(value, list) else [] if value is None else [value]
