"""The page: every text that comes in is escaped here, once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from launcher.report.plain import escape
from launcher.report.plots import Picture
from launcher.report.svg import key_swatch

# The first bytes of a report: how one is told from a file of the user's.
MARK = "<!doctype html><!-- launcher report -->"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: its id.
        title: its heading.
        body: its content.
    """

    anchor: str
    title: str
    body: Html


def text(value: Any) -> Html:
    """Any value as escaped text; markup stays as it is."""
    if isinstance(value, Html):
        return value
    return Html(escape(value))


def join(*parts: Any) -> Html:
    """Parts one after the other."""
    return Html("".join(text(part) for part in parts if part))


def element(tag: str, *parts: Any, **attributes: str) -> Html:
    """`<tag ...>parts</tag>`; `class_` stands for class."""
    told = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{told}>{join(*parts)}</{tag}>")


def paragraph(*parts: Any, class_: str = "") -> Html:
    """A paragraph."""
    return element("p", *parts, class_=class_) if class_ else element("p", *parts)


def listed(items: Sequence[Any], class_: str = "plain") -> Html:
    """A list; nothing for no items."""
    return element("ul", *(element("li", item) for item in items), class_=class_) if items else Html("")


def badge(label: str, kind: str) -> Html:
    """A coloured word; `kind` is 'good', 'bad', 'warn' or 'quiet'."""
    return element("span", label, class_=f"badge {kind}")


def facts(entries: Sequence[tuple[str, Any, Any]]) -> Html:
    """The figures at the top: label, value and a small note for each."""
    cells = [
        element("div", element("dt", label), element("dd", value, element("small", note) if note else ""))
        for label, value, note in entries
    ]
    return element("dl", *cells, class_="facts")


def table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    caption: str,
    *,
    numeric: Collection[int] = (),
    whole: Collection[int] = (),
    marked: Collection[int] = (),
    class_: str = "",
) -> Html:
    """A table whose first column names the row.

    Args:
        head: the columns' titles.
        rows: cells.
        caption: what it lists.
        numeric: columns of numbers, set to the right.
        whole: columns whose cells are kept on one line.
        marked: rows to stand out.
        class_: of the table.
    """
    numeric = set(numeric)

    def cell(tag: str, index: int, value: Any, scope: str = "") -> Html:
        known = {"class_": "n"} if index in numeric else {"class_": "w"} if index in whole else {}
        return element(tag, value, **known, **({"scope": scope} if scope else {}))

    top = element("tr", *(cell("th", i, title, "col") for i, title in enumerate(head)))
    body: list[Html] = []
    for number, row in enumerate(rows):
        cells = [cell("td" if i else "th", i, value, "" if i else "row") for i, value in enumerate(row)]
        body.append(element("tr", *cells, class_="marked") if number in marked else element("tr", *cells))
    made = element("table", element("caption", caption), element("thead", top), element("tbody", *body), class_=class_)
    return element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def figure(picture: Picture, caption: Any) -> Html:
    """A picture with its legend and what it shows."""
    keys = [element("li", Html(key_swatch(key)), key.label) for key in picture.keys]
    legend = element("ul", *keys, class_="legend") if keys else ""
    drawn = element("div", Html(picture.svg), class_="plot")
    return element("figure", legend, drawn, element("figcaption", caption))


def folded(summary: Any, *parts: Any) -> Html:
    """What is shown when asked for, and always printed."""
    return element("details", element("summary", summary), *parts)


def page(title: str, header: Html, sections: Sequence[Section], footer: str) -> str:
    """The whole file; nothing in it is loaded from elsewhere, and nothing runs."""
    links = [element("li", element("a", s.title, href=f"#{s.anchor}")) for s in sections]
    blocks = [
        element("section", element("h2", s.title, id=f"{s.anchor}-title"), s.body, id=s.anchor,
                aria_labelledby=f"{s.anchor}-title")
        for s in sections
    ]  # fmt: skip
    style = files("launcher.report").joinpath("page.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # Whatever a config or a log may hold, a browser is told to run and load nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="launcher report">'
        # A browser asks for /favicon.ico otherwise.
        '<link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{style}</style>"
    )
    nav = element("nav", element("ul", *links), aria_label="Sections")
    body = join(element("header", header), nav, element("main", *blocks), element("footer", footer))
    return f'{MARK}\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
