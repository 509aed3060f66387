"""What all plots share: figures as SVG with the colours and the font of the page, axes, and marks."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator
from typing_extensions import override

from launcher.report.records import Numbers
from launcher.report.series import Line

# Placeholders: matplotlib writes these colours into the SVG, and each is replaced with a CSS variable of the page.
INK, MUTED, GRID, SURFACE, BAD, WARN, GOOD = (f"#0a0b{n:02x}" for n in range(1, 8))
SERIES = tuple(f"#0a0c{n:02x}" for n in range(1, 7))
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", BAD: "bad", WARN: "warn", GOOD: "good",
    **{color: f"s{n}" for n, color in enumerate(SERIES, 1)},
}  # fmt: skip
# Lines must differ without colour too.
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 2, 2, 2)))
_SETTINGS = {
    "svg.fonttype": "none", "text.parse_math": False, "text.color": INK, "font.size": 10.5,
    "axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "axes.labelsize": 10.5, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round", "path.simplify": True,
}  # fmt: skip
# Width of a figure across the page, of one that fits a phone, and of one of several beside each other, in 72 points.
_WIDTH, _NARROW, _SMALL = 10.0, 5.0, 4.4
# Room on the left for the labels of the axis, at least.
_LEFT, _RIGHT = 1.0, 0.15
# Numbers up to this many digits have no exponent in the labels.
_PLAIN_DIGITS = 6
# From the left edge to the labels of the ticks, with a label of the axis, and from them to the axis.
_AXIS_LABEL, _TICK = 0.25, 0.12


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend; legends are in the page, not in the picture, so that users' texts wrap.

    Attributes:
        color: one of this module's.
        shape: 'line', 'points' (a line with marks), 'band', 'bar', or a marker: 'triangle', 'up', 'circle', 'square',
            'cross', 'diamond', 'tick'.
        dash: index into `DASHES`, for a line.
    """

    label: str
    color: str
    shape: str = "line"
    dash: int = 0


@dataclass
class Plot:
    """A figure of matplotlib with its legend.

    Attributes:
        name: unique in the page; the caption's id is `NAME-d`.
        title: for screen readers.
        axes: top to bottom.
        is_small: whether it is one of several beside each other.
        svg: set when the plot is finished: two elements, for a wide page and for a phone.
    """

    name: str
    title: str
    figure: Figure
    axes: Sequence[Any]
    keys: list[Key] = field(default_factory=list[Key])
    is_small: bool = False
    svg: str = ""


@contextmanager
def new_plot(
    name: str, title: str, height: float, rows: Sequence[float] = (1,), *, is_small: bool = False
) -> Iterator[Plot]:
    """A figure to draw into, whose axes line up with those of the page's other figures.

    Args:
        name: unique in the page; the ids in the figure depend only on it.
        title: for screen readers.
        height: in units of 72 points.
        rows: relative heights of the axes, which share their horizontal axis.
        is_small: for one of several beside each other.
    """
    settings: dict[Any, Any] = {**_SETTINGS, "svg.hashsalt": name}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(_SMALL if is_small else _WIDTH, height))
        FigureCanvasSVG(figure)
        figure.subplots_adjust(bottom=0.6 / height, top=1 - 0.12 / height, hspace=0.12)
        axes = list(figure.subplots(len(rows), 1, sharex=True, height_ratios=rows, squeeze=False)[:, 0])
        for each in axes:
            each.yaxis.set_major_formatter(_NumberFormatter())
        plot = Plot(name, title, figure, axes, is_small=is_small)
        if is_small:
            # Ticks take most of the time of a plot.
            axes[0].yaxis.set_major_locator(MaxNLocator(nbins=3))
        yield plot
        if is_small:
            plot.svg = _to_svg(plot, _SMALL, "")
        else:
            plot.svg = _to_svg(plot, _WIDTH, "wide") + _to_svg(plot, _NARROW, "narrow")


def _to_svg(plot: Plot, width: float, kind: str) -> str:
    """An `<svg>` element for a page, with this CSS class."""
    plot.figure.set_size_inches(width, plot.figure.get_figheight())
    # Small plots have no label on the left.
    left = 0.62 if plot.is_small else _LEFT if width == _WIDTH else 0.85
    left = max(left, *(_measure_left(axes) for axes in plot.axes))
    plot.figure.subplots_adjust(left=left / width, right=1 - _RIGHT / width)
    for axes in plot.axes:
        axes.yaxis.set_label_coords(-(left - 0.2) / (width - left - _RIGHT), 0.5)
        if width != _WIDTH and isinstance(axes.xaxis.get_major_locator(), MaxNLocator):
            axes.xaxis.get_major_locator().set_params(nbins=4)
    prefix, buffer = plot.name + ("-narrow" if kind == "narrow" else ""), io.StringIO()
    plot.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    head, _, body = buffer.getvalue().partition("<svg")[2].partition(">")
    box = re.search(r'viewBox="(\S+ \S+ (\S+) \S+)"', head)
    if box is None:
        raise ValueError(f"the SVG of {plot.name} has no viewBox")
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    # The ids of groups would not be unique in the page, and nothing refers to them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", body).replace("xlink:href", "href")
    body = _compress(body, 1 if plot.is_small else 2)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    label = f"{prefix}-t"
    return (
        f'<svg viewBox="{box[1]}" class="{kind or "small"}" style="max-width:{float(box[2]) * 1.5:.0f}px" role="img" '
        f'aria-labelledby="{label} {plot.name}-d"><title id="{label}">{escape(plot.title)}</title>{body}'
    )


class _NumberFormatter(Formatter):
    """Labels with as many digits as the ticks differ in, and no offset above the axis, which would be cut."""

    @override
    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.6g}"

    @override
    def format_ticks(self, values: Any) -> list[str]:
        labels = [self(value) for value in values]
        error = 0.01 * min(np.diff(np.sort(values)), default=0.0)
        for digits in range(1, 16):
            # Rounded first: with few digits, `g` writes 150 as 1.5e+02.
            rounded = [float(f"{value if abs(value) > error else 0:.{digits}g}") for value in values]
            labels = [f"{value:.{max(digits, _PLAIN_DIGITS)}g}" for value in rounded]
            if all(abs(float(label) - value) <= error for label, value in zip(labels, values, strict=True)):
                break
        return labels


def _measure_left(axes: Any) -> float:
    """The width that the labels on the left of an axis need: an estimate, as measuring takes longer than drawing."""
    ticks = axes.yaxis.get_major_formatter().format_ticks(axes.yaxis.get_majorticklocs())
    # The widths of digits and of letters in wide fonts.
    widest = max((sum(0.64 if sign.isdigit() else 0.5 for sign in label) for label in ticks), default=0)
    return widest * _SETTINGS["font.size"] / 72 + _TICK + (_AXIS_LABEL if axes.get_ylabel() else 0)


# An innermost group without an attribute; an element without content.
_GROUP = re.compile(r"<g>\n?((?:(?!</?g[ >]).)*?)\n?</g>|\n<g/>|<defs>\n?</defs>", re.DOTALL)


def _compress(body: str, digits: int) -> str:
    """The same picture in fewer bytes, with the font and the line ends of the page; coordinates get `digits` digits."""

    def shorten(number: re.Match[str]) -> str:
        return f"{float(number[0]):.{digits}f}".rstrip("0").rstrip(".")

    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", body)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(rf"-?\d+\.\d{{{digits},}}", shorten, tag[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body).replace("\nL ", " ").replace('\n"', '"')
    count = 1
    while count:
        body, count = _GROUP.subn(r"\1", body)
    return body


def set_step_axis(axes: Any) -> None:
    """Make the horizontal axis one of optimizer steps."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Label the rows of a bar chart, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def use_log2_scale(axes: Any) -> None:
    """Make the vertical axis logarithmic to base 2: loss scales are halved and doubled."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"2^{math.log2(value):.0f}")
    )


def use_log_scale_if_wide(axes: Any, values: Numbers) -> None:
    """Make the vertical axis logarithmic if the values span more than two decades."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()


def cut_outliers(axes: Any, steps: Numbers, values: Numbers, keys: list[Key]) -> None:
    """Start the vertical axis at zero, end it above most values, and mark where values are higher."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    usual = float(np.percentile(finite, 90))
    high = float(finite.max())
    cut = high > 4 * usual > 0
    top = 2 * usual if cut else 1.12 * high
    axes.set_ylim(0, top or 1.0)
    if cut:
        at = np.unique(steps[np.isfinite(values) & (values > top)])
        shown = at[thin(len(at), 100)]
        axes.plot(shown, np.full(len(shown), 0.97), transform=axes.get_xaxis_transform(), linestyle="", marker="^",
                  markersize=6, color=WARN, clip_on=False)  # fmt: skip
        keys.append(Key("higher than the axis", WARN, "up"))


def mark_not_finite(axes: Any, line: Line) -> int:
    """Draw a cross at the upper edge for each value that is not finite; returns their number."""
    broken = line.steps[~np.isfinite(line.values)]
    if len(broken):
        shown = broken[thin(len(broken))]
        axes.plot(shown, np.full(len(shown), 0.98), transform=axes.get_xaxis_transform(), linestyle="", marker="x",
                  markersize=6, markeredgewidth=1.8, color=BAD, clip_on=False)  # fmt: skip
    return len(broken)


def mark_restarts(axes: Any, restarts: Sequence[float], keys: list[Key]) -> None:
    """Draw a vertical line at each step that a later attempt started from."""
    for step in restarts[:50]:
        axes.axvline(step, color=MUTED, linewidth=1.3, linestyle=DASHES[2])
    if restarts:
        keys.append(Key("a later attempt starts", MUTED, dash=2))


def thin(count: int, limit: int = 400) -> slice:
    """Evenly spaced indices, at most `limit` out of `count`."""
    return slice(None, None, max(1, -(-count // limit)))
