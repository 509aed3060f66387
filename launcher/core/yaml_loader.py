"""The YAML of config files: YAML 1.1, except that 1e-4 is a number, 12:00:00 and dates are text, and a repeated key is
an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

# YAML 1.1 requires a dot and a sign in the exponent ("1.0e-4"); Python does not.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
# No folding of long lines.
_WIDTH = 1_000_000


class Loader(yaml.SafeLoader):
    """Reads config files."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """The tag of a node. 12:00:00 is text, not YAML 1.1's number 43200; so is a date, as for LightningCLI."""
        tag = super().resolve(kind, value, implicit)
        is_time = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in value
        return "tag:yaml.org,2002:str" if is_time or tag == "tag:yaml.org,2002:timestamp" else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; rejects a key that is given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str | int):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text '1e-4', which `Loader` would read as a number."""


for _side in (Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote text with any of Unicode's seven line breaks: without quotes PyYAML reads some of them back as others."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `Loader` reads back unchanged; other values are written as their text."""
    return yaml.dump(_plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)


def _plain(value: Any) -> Any:
    """A copy without shared objects, which YAML would write as references."""
    if isinstance(value, Mapping):
        return {_plain_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    # A member of a text enum is written as its value.
    return str.__str__(value) if isinstance(value, str) else str(value)


def _plain_key(key: Any) -> Any:
    return key if isinstance(key, bool | int | float | str) or key is None else str(key)
