"""Values of JSON and YAML files that anybody may have written: each getter answers whatever lies there."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

# Colours of a terminal, and what no page may carry.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def escape(value: Any) -> str:
    """Any value as text that a page shows as it is."""
    return html.escape(_ESCAPES.sub("", str(value)))


def mapping(value: Any) -> Mapping[str, Any]:
    """The mapping; an empty one for anything else."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """The list; an empty one for anything else."""
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def texts(value: Any) -> list[str]:
    """The list's items as text; none for anything else."""
    return [str(item) for item in items(value)]


def number(value: Any) -> float | None:
    """The number; None for anything else."""
    return float(value) if type(value) in (int, float) else None


def shown(value: Any) -> str:
    """A setting as it would stand in YAML, near enough."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
