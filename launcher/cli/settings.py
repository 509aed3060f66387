"""All settings with their types and defaults, for the help."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from launcher.config.schema import RunConfig, config_fields

TITLE = "all settings, with their types and defaults:"
_COLUMN = 52


def list_settings() -> str:
    """One line for each setting, in less than 80 columns."""
    return "\n".join([TITLE, *_rows()])


def _rows() -> Iterator[str]:
    defaults = RunConfig().to_dict()
    for path, info in config_fields():
        group, _, key = path.rpartition(".")
        default = json.dumps((defaults[group] if group else defaults)[key])
        yield f"{f'  --{path} {describe_type(info.hint)}':{_COLUMN}}{default}"


def describe_type(hint: Any) -> str:
    """A type as in the usage of a command, such as `int|auto`; `null`, which most settings accept, is left out."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        parts = [each for each in typing.get_args(hint) if each is not type(None)]
        return "|".join(dict.fromkeys(map(describe_type, parts)))
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    kind: type = typing.get_origin(hint) or hint
    names: dict[type, str] = {str: "text", bool: "true|false", dict: "mapping"}
    return names.get(kind, kind.__name__)
