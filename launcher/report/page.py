"""Renders the page from `templates/`. Every text is escaped: names, metrics, configs and logs are users'."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from launcher.report import units

if TYPE_CHECKING:
    from jinja2 import Environment

# The first bytes of a report, by which `launcher report` recognizes a file that it may replace.
MARK = "<!doctype html><!-- launcher report -->"
# Terminal colours, and characters that HTML does not allow.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, with the values for its macro in `sections.html.j2`; `macro` is empty if it is the anchor."""

    anchor: str
    title: str
    view: Mapping[str, Any]
    macro: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first cell of a row is its header.

    Attributes:
        rows: cells: a text, a list of texts, or a mapping with `text` and, if wanted, `badge` and `note`.
        numeric: columns to align right.
        nowrap: columns to keep on one line.
        marked: rows to highlight.
        kind: CSS class of the table.
        terms: what the titles of columns mean, where that is not obvious.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Collection[int] = ()
    nowrap: Collection[int] = ()
    marked: Collection[int] = ()
    kind: str = ""
    terms: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def is_stacked(self) -> bool:
        """Whether a phone shows each row as a block: a table of numbers scrolls in its box instead."""
        return any(i not in self.numeric for i in range(1, len(self.head)))


def render_page(template: str, title: str, sections: Sequence[Section], footer: str, **values: Any) -> str:
    """The complete file, which loads nothing and runs no script; `values` are for the header of the template."""
    page = _environment().get_template(template)
    return MARK + page.render(title=title, sections=sections, footer=footer, **values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from launcher.report.drawing import DASHES, VARIABLES

    environment = Environment(loader=PackageLoader("launcher.report"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=_remove_control_characters)  # fmt: skip
    for name in ("number", "count", "plural", "duration", "bytes", "time", "ranks"):
        environment.filters[name] = getattr(units, f"format_{name}")
    environment.globals.update(VARIABLES=VARIABLES, DASHES=DASHES)
    return environment


def _remove_control_characters(value: Any) -> Any:
    """The value without control characters; markup stays markup."""
    from markupsafe import Markup

    return Markup(_CONTROL.sub("", value)) if isinstance(value, Markup) else _CONTROL.sub("", str(value))  # noqa: S704
