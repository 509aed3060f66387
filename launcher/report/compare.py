"""Two runs beside each other, with what differs standing out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.core.nested import flatten
from launcher.report.markup import Html, Section, badge, element, figure, folded, join, listed, paragraph, table, text
from launcher.report.overview import BADGES, Figure, figures_of
from launcher.report.plain import shown
from launcher.report.plots import Curve, draw_curves
from launcher.report.records import AttemptRecord, History
from launcher.report.series import (
    Line,
    learning_rate_lines,
    main_metric,
    metric_line,
    step_time_line,
    validation_line,
    validation_metric,
)
from launcher.report.source import Run

# Of the plan: its own section, or too long to be read beside another.
_PLAN_LEFT_OUT = ("memory", "deepspeed", "notices")
# Numbers this near do not stand out.
_NEAR = 0.02
# These two differ between any two runs.
_CONFIG_LEFT_OUT = frozenset({"name", "runs_dir"})


def compared_header(one: Run, two: Run) -> Html:
    """Both names, how they ended, and their figures in one table."""
    names = labels(one, two)
    problems = [text(f"{name}: {problem}") for name, run in zip(names, (one, two), strict=True)
                for problem in run.problems]  # fmt: skip
    where = [element("p", name, ": ", str(run.path), " ", badge(*BADGES[run.history.outcome]), class_="sub")
             for name, run in zip(names, (one, two), strict=True)]  # fmt: skip
    return join(element("h1", f"{names[0]} and {names[1]}"), *where, listed(problems, "notes"))


def compared_sections(one: Run, two: Run) -> list[Section]:
    """Figures, curves, and the differences of config, plan and versions."""
    names, histories = labels(one, two), (one.history, two.history)
    return [
        Section("figures", "Figures", _figures(one, two)),
        _curves(names, histories),
        _differences("config", "Config", names, flatten(one.config), flatten(two.config), "setting", _CONFIG_LEFT_OUT),
        _differences("plan", "Plan", names, _plan(one), _plan(two), "decision"),
        _differences("versions", "Versions", names, one.history.versions, two.history.versions, "library"),
    ]


def labels(one: Run, two: Run) -> tuple[str, str]:
    """What the runs are called: their names, with letters if those are equal."""
    return (one.name, two.name) if one.name != two.name else (f"{one.name} (A)", f"{two.name} (B)")


def _figures(one: Run, two: Run) -> Html:
    first, second = ({figure.label: figure for figure in figures_of(run)} for run in (one, two))
    rows: list[Sequence[Any]] = []
    marked: list[int] = []
    for label in dict.fromkeys((*first, *second)):
        a, b = first.get(label), second.get(label)
        said = _difference(a, b)
        if said not in ("", "same", "near"):
            marked.append(len(rows))
        rows.append((label, _figure(a), _figure(b), said))
    names = labels(one, two)
    return table(("", *names, f"{names[1]} against {names[0]}"), rows, "What matters most", marked=marked)


def _difference(a: Figure | None, b: Figure | None) -> str:
    """In words; empty if one is missing."""
    if a is None or b is None:
        return ""
    if a.value == b.value:
        return "same"
    if a.amount is None or b.amount is None:
        return "differs"
    if not a.amount or not math.isfinite(a.amount) or not math.isfinite(b.amount):
        return "differs"
    ratio = b.amount / a.amount
    return f"{ratio:.3g} \u00d7" if abs(ratio - 1) >= _NEAR else "near"


def _figure(figure: Figure | None) -> Html:
    if figure is None:
        return text("\u2013")
    return join(figure.value, element("small", " (", figure.note, ")") if figure.note else "")


def _curves(names: tuple[str, str], histories: tuple[History, History]) -> Section:
    parts: list[Any] = []
    mains = [main_metric(history) for history in histories]
    losses = [_curve(f"{name}: {main}", history, _metric(main), trend=True)
              for name, history, main in zip(names, histories, mains, strict=True) if main]  # fmt: skip
    for name, history, main in zip(names, histories, mains, strict=True):
        validated = validation_metric(history, main)
        if validated:
            losses.append(_curve(f"{name}: {validated}", history, _validation(validated), points=True))
    pictures: list[tuple[str, str, str, str, list[Curve], bool]] = [
        ("loss", "Loss", "Loss over optimizer steps; thin lines are what was logged.", "loss", losses, False),
    ]
    for anchor, title, said, unit, line_of, from_zero in (
        ("rate", "Learning rate", "Learning rate of the first parameter group.", "learning rate", _rate, False),
        ("scale", "Loss scale", "Loss scale of rank 0.", "loss scale", _scale, False),
        ("time", "Step time", "Wall time of an optimizer step, rank 0.", "ms a step", step_time_line, True),
    ):
        curves = [
            _curve(name, history, line_of, trend=from_zero) for name, history in zip(names, histories, strict=True)
        ]
        pictures.append((anchor, title, said, unit, curves, from_zero))
    for anchor, title, said, unit, curves, from_zero in pictures:
        if any(len(line.steps) for curve in curves for line in curve.lines):
            height = 3.0 if anchor == "loss" else 2.3
            drawn = draw_curves(anchor, title, said, unit, curves, height=height, from_zero=from_zero,
                                by_twos=anchor == "scale")  # fmt: skip
            parts.append(figure(drawn, said))
    return Section("curves", "Loss, learning rate and speed", join(*parts) or paragraph("Neither run logged a step."))


def _curve(
    label: str, history: History, line_of: Callable[[AttemptRecord], Line], *, trend: bool = False, points: bool = False
) -> Curve:
    return Curve(label, tuple(line_of(attempt) for attempt in history.attempts), trend, points)


def _metric(name: str) -> Callable[[AttemptRecord], Line]:
    return lambda attempt: metric_line(attempt, name)


def _validation(name: str) -> Callable[[AttemptRecord], Line]:
    return lambda attempt: validation_line(attempt, name)


def _rate(attempt: AttemptRecord) -> Line:
    lines = learning_rate_lines(attempt)
    return lines[0] if lines else metric_line(attempt, "")


def _scale(attempt: AttemptRecord) -> Line:
    table = attempt.rank_table
    if table is None or 0 not in table.ranks:
        return metric_line(attempt, "")
    steps, values = table.steps, table.column("loss_scale")[0]
    # NaN is where nothing scales; the axis is logarithmic.
    told = values > 0
    return Line(steps[told], values[told])


def _plan(run: Run) -> dict[str, Any]:
    plan = {key: value for key, value in run.history.plan.items() if key not in _PLAN_LEFT_OUT}
    return flatten(plan)


def _differences(
    anchor: str,
    title: str,
    names: tuple[str, str],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    what: str,
    left_out: frozenset[str] = frozenset(),
) -> Section:
    """What differs, then, folded, what is the same."""
    keys = [key for key in dict.fromkeys((*first, *second)) if key not in left_out]
    differ = [key for key in keys if key not in first or key not in second or first[key] != second[key]]
    same = [key for key in keys if key not in differ]
    rows = [(key, _value(first, key), _value(second, key)) for key in differ]
    parts: list[Any] = []
    if rows:
        parts.append(table((what, *names), rows, "What differs", class_="keys"))
    else:
        parts.append(paragraph("No difference." if same else "Neither run recorded any."))
    if same:
        equal = table((what, "both"), [(key, _value(first, key)) for key in same], "The same in both", class_="keys")
        parts.append(folded(f"{len(same)} the same in both", equal))
    return Section(anchor, title, join(*parts))


def _value(values: Mapping[str, Any], key: str) -> Html:
    if key not in values:
        return text("not set")
    value = values[key]
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        return listed([text(v) for v in value])
    if isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
        return listed([text(", ".join(f"{k} {shown(v)}" for k, v in entry.items())) for entry in value])
    return text(shown(value))
