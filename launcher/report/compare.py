"""The sections of a page that compares two runs: figures, curves, and differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from launcher.core.nested import flatten
from launcher.report import series
from launcher.report.overview import Figure, list_figures
from launcher.report.page import Section, Table
from launcher.report.plots import Curve, CurveAxes, draw_curves
from launcher.report.records import AttemptRecord, History
from launcher.report.series import Line
from launcher.report.source import Run
from launcher.report.units import format_setting

# Parts of the plan that are shown elsewhere, or are too long for a table of differences.
_OMITTED_PLAN = ("memory", "deepspeed", "notices")
# Settings that differ between any two runs.
_OMITTED_CONFIG = ("name", "runs_dir")
# A smaller relative difference is not highlighted.
_NEAR = 0.02


def list_compared_sections(one: Run, two: Run) -> list[Section]:
    """Figures, curves, and the differences of config, plan and versions."""
    names = label_runs(one, two)
    config = [_omit(flatten(run.config), _OMITTED_CONFIG) for run in (one, two)]
    plan = [flatten(_omit(run.history.plan, _OMITTED_PLAN)) for run in (one, two)]
    versions = [run.history.versions for run in (one, two)]
    return [
        Section("figures", "Figures", {"table": _compare_figures(one, two)}),
        _compare_curves({name: run.history for name, run in zip(names, (one, two), strict=True)}),
        Section("config", "Config", _compare("setting", names, *config), "differences"),
        Section("plan", "Plan", _compare("decision", names, *plan), "differences"),
        Section("versions", "Versions", _compare("library", names, *versions), "differences"),
    ]


def label_runs(one: Run, two: Run) -> tuple[str, str]:
    """The names of the runs, with a letter if they are equal."""
    return (one.name, two.name) if one.name != two.name else (f"{one.name} (A)", f"{two.name} (B)")


def _compare_figures(one: Run, two: Run) -> Table:
    first, second = ({figure.label: figure for figure in list_figures(run)} for run in (one, two))
    rows: list[tuple[Any, ...]] = []
    for label in dict.fromkeys((*first, *second)):
        a, b = first.get(label), second.get(label)
        cells = ({"text": f.value, "note": f.note} if f else "\u2013" for f in (a, b))
        rows.append((label, *cells, _describe_difference(a, b)))
    names = label_runs(one, two)
    marked = [i for i, row in enumerate(rows) if row[-1] not in ("", "same", "near")]
    return Table("Main figures", ("", *names, f"{names[1]} relative to {names[0]}"), rows, marked=marked)


def _describe_difference(a: Figure | None, b: Figure | None) -> str:
    """'same', 'near', 'differs' or a ratio; empty if a figure is missing."""
    if a is None or b is None:
        return ""
    if a.value == b.value:
        return "same"
    if not a.amount or b.amount is None or not math.isfinite(a.amount) or not math.isfinite(b.amount):
        return "differs"
    ratio = b.amount / a.amount
    return f"{ratio:.3g} \u00d7" if abs(ratio - 1) >= _NEAR else "near"


def _compare_curves(histories: Mapping[str, History]) -> Section:
    losses = [
        Curve(f"{name}: {loss}", [series.metric_line(a.steps, loss) for a in history.attempts], trend=True)
        for name, history in histories.items()
        if (loss := series.find_loss(history))
    ]
    losses += [
        Curve(f"{name}: {loss}", [series.metric_line(a.validations, loss) for a in history.attempts], points=True)
        for name, history in histories.items()
        if (loss := series.find_validation_loss(history))
    ]

    def curves(line_of: Callable[[AttemptRecord], Line], *, trend: bool = False) -> list[Curve]:
        return [Curve(name, [line_of(a) for a in h.attempts], trend) for name, h in histories.items()]

    plots = (
        (CurveAxes("loss", "Loss", "loss"), losses, "Loss over optimizer steps; thin lines are the logged values."),
        (CurveAxes("rate", "Learning rate", "learning rate", 2.3), curves(_first_learning_rate),
         "Learning rate of the first parameter group."),
        (CurveAxes("scale", "Loss scale", "loss scale", 2.3, "loss scale"), curves(series.loss_scale_line),
         "Loss scale of rank 0."),
        (CurveAxes("time", "Step time", "ms a step", 2.3, "time"), curves(series.step_time_line, trend=True),
         "Wall time of an optimizer step, rank 0."),
    )  # fmt: skip
    drawn = [(draw_curves(axes, lines), caption) for axes, lines, caption in plots
             if any(len(line.steps) for curve in lines for line in curve.lines)]  # fmt: skip
    return Section("curves", "Loss, learning rate and speed", {"plots": drawn})


def _first_learning_rate(attempt: AttemptRecord) -> Line:
    return next(iter(series.learning_rate_lines(attempt)), series.metric_line((), ""))


def _omit(values: Mapping[str, Any], omitted: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in omitted}


def _compare(kind: str, names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """A table of the values that differ, and one of the equal values; each None if it is empty."""
    keys = list(dict.fromkeys((*first, *second)))
    equal = [key for key in keys if key in first and key in second and first[key] == second[key]]
    differ = [(key, _format_cell(first, key), _format_cell(second, key)) for key in keys if key not in equal]
    same = [(key, _format_cell(first, key)) for key in equal]
    return {
        "differ": Table("Differences", (kind, *names), differ, kind="keys") if differ else None,
        "same": Table("Equal in both runs", (kind, "both"), same, kind="keys") if same else None,
        "count": len(same),
    }


def _format_cell(values: Mapping[str, Any], key: str) -> str | list[str]:
    value = values.get(key)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(entry, str) for entry in value):
            return list(value)
        if all(isinstance(entry, Mapping) for entry in value):
            return [", ".join(f"{k} {format_setting(v)}" for k, v in entry.items()) for entry in value]
    return format_setting(value) if key in values else "not set"
