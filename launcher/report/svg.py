"""A matplotlib figure as SVG that takes its colours and its font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from launcher.report.plain import escape

# Placeholders: matplotlib writes them into the SVG, and each becomes a CSS variable of the page.
INK, MUTED, GRID, SURFACE, BAD, WARN, GOOD = (f"#0a0b{n:02x}" for n in range(1, 8))
SERIES = tuple(f"#0a0c{n:02x}" for n in range(1, 7))
_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", BAD: "bad", WARN: "warn", GOOD: "good",
    **{color: f"s{n}" for n, color in enumerate(SERIES, 1)},
}  # fmt: skip
# Told apart without colour, too.
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 2, 2, 2)))
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.color": SURFACE,
    "hatch.linewidth": 1.4,
    "path.simplify": True,
}


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend, which stands in the page and not in the picture.

    Attributes:
        label: what it stands for; any text.
        color: one of this module's.
        shape: 'line', 'band', 'bar', or a marker: 'triangle', 'up', 'circle', 'square', 'cross', 'diamond', 'tick'.
        dash: index into `DASHES`, for a line.
    """

    label: str
    color: str
    shape: str = "line"
    dash: int = 0


@contextmanager
def plot_style(name: str) -> Iterator[None]:
    """Matplotlib's settings for one figure; ids in it depend on `name` alone."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {**_SETTINGS, "svg.hashsalt": name}
    with mpl.rc_context(settings):
        yield


def to_svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as an `<svg>` element for a page.

    Args:
        figure: matplotlib's; drawn in `plot_style`.
        name: unique in the page.
        title: its short name, for those who do not see it.
        description: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    if box is None:
        raise ValueError(f"the SVG of {name} has no viewBox")
    width = float(box[1].split()[2])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # Groups' ids would not be unique in the page, and nothing refers to them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    # The page's font, and a tenth of a point.
    body = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{2,}", _shorter, tag[0]), body)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    return (
        f'<svg viewBox="{box[1]}" style="max-width:{width * 1.5:.0f}px" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{body}'
    )


def key_swatch(key: Key) -> str:
    """A legend's little picture."""
    color = f"var(--{_VARIABLES[key.color]})"
    shapes = {
        "band": f'<rect x="1" y="2" width="22" height="10" rx="1" fill="{color}" opacity=".3"/>',
        "bar": f'<rect x="5" y="1" width="14" height="12" rx="2" fill="{color}"/>',
        "triangle": f'<path d="M12 12 L6 2 L18 2 Z" fill="{color}"/>',
        "up": f'<path d="M12 2 L18 12 L6 12 Z" fill="{color}"/>',
        "circle": f'<circle cx="12" cy="7" r="4.5" fill="{color}"/>',
        "square": f'<rect x="7.5" y="2.5" width="9" height="9" fill="{color}"/>',
        "cross": f'<path d="M7.5 2.5 l9 9 m0 -9 l-9 9" stroke="{color}" stroke-width="2.6"/>',
        "diamond": f'<path d="M12 1.5 l5.5 5.5 -5.5 5.5 -5.5 -5.5 Z" fill="none" stroke="{color}" stroke-width="2"/>',
        "tick": f'<path d="M12 1 V13" stroke="{color}" stroke-width="2"/>',
    }
    dash = DASHES[key.dash % len(DASHES)]
    pattern = "" if dash == "-" else f' stroke-dasharray="{" ".join(str(2 * n) for n in dash[1])}"'
    line = f'<path d="M0 7 H24" stroke="{color}" stroke-width="2.4"{pattern}/>'
    return f'<svg class="swatch" viewBox="0 0 24 14" aria-hidden="true">{shapes.get(key.shape, line)}</svg>'


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
