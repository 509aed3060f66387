"""The YAML of config files: YAML 1.1, but 1e-4 is a number both ways, 12:00:00 and dates are text, a key given twice
an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

# YAML 1.1 wants a dot and a sign in the exponent ("1.0e-4"); people and Python don't.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
# No folding: each setting stays on the lines that its value has.
_WIDTH = 1_000_000


class Loader(yaml.SafeLoader):
    """Reads what people write."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """The tag of a node.

        YAML 1.1 reads times as numbers to the base of 60, seconds where SLURM means hours. A date is text, as for
        LightningCLI.
        """
        tag = super().resolve(kind, value, implicit)
        is_time = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in value
        return "tag:yaml.org,2002:str" if is_time or tag == "tag:yaml.org,2002:timestamp" else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; refuses a key that is given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str | int):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text '1e-4', which `Loader` would take for a number."""


for _side in (Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks, which Unicode has seven of, are escaped: unquoted, PyYAML reads some back as others."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `Loader` reads back as the same; what is not plain is written as its text."""
    return yaml.dump(_plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)


def _plain(value: Any) -> Any:
    """A copy without shared parts, which YAML would write as references."""
    if isinstance(value, Mapping):
        return {_plain_key(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    # An enum's member that is text is its value.
    return str.__str__(value) if isinstance(value, str) else str(value)


def _plain_key(key: Any) -> Any:
    return key if isinstance(key, bool | int | float | str) or key is None else str(key)
