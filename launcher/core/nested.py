"""Nested mappings by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def flatten(
    values: Mapping[str, Any], descend: Callable[[str], bool] = lambda path: True, prefix: str = ""
) -> dict[str, Any]:
    """Dotted path to value, in the given order; an empty mapping stays a value.

    Args:
        values: nested mappings.
        descend: whether the mapping at a path is a group of settings; otherwise it stays a value.
        prefix: of every path.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if value and isinstance(value, Mapping) and descend(path):
            flat.update(flatten(value, descend, f"{path}."))
        else:
            flat[path] = value
    return flat
