"""Markdown tables."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `|` in a cell is escaped."""
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Inline code for a cell: as HTML, because a cell of Markdown cannot hold code with `|`.

    A browser may break the line after `_`, `.`, `/` and `-`, and before a capital.
    """
    escaped = html.escape(text, quote=False).replace("|", "&#124;")
    breakable = re.sub(r"([_./-]+)(?=[a-z])|(?<=[a-z])(?=[A-Z])", r"\1<wbr>", escaped)
    return f"<code>{breakable}</code>"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
