"""Nested mappings by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def flatten(
    values: Mapping[str, Any], descend: Callable[[str], bool] = lambda path: True, prefix: str = ""
) -> dict[str, Any]:
    """Dotted path to value, in the given order. Empty mappings, and those that `descend` rejects, remain values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and descend(path):
            flat.update(flatten(value, descend, f"{path}."))
        else:
            flat[path] = value
    return flat
