"""The sections of a page that compares runs: figures, curves, metrics, and differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.core.event_text import format_value
from launcher.core.nested import flatten
from launcher.report import series
from launcher.report.metric_pairs import group_metrics
from launcher.report.metric_sections import SmallPlot, arrange, to_curve
from launcher.report.metrics import find_loss, find_validation_loss, summarize_metric
from launcher.report.overview import Figure, list_figures
from launcher.report.page import Section, Table
from launcher.report.plots import Curve, CurveAxes, draw_curves
from launcher.report.records import AttemptRecord
from launcher.report.series import Line
from launcher.report.source import Run
from launcher.report.units import format_number

# Parts of the plan that are shown elsewhere, or are too long for a table of differences.
_OMITTED_PLAN = ("memory", "deepspeed", "notices")
# Settings that differ between any two runs.
_OMITTED_CONFIG = ("name", "runs_dir")
# A smaller relative difference is not highlighted.
_NEAR = 0.02
# Runs with a colour in the plots; the others are thin lines.
MOST_COLORED = 8
_MOST_PLOTS = 200


def list_compared_sections(runs: Sequence[Run]) -> list[Section]:
    """Figures, curves, metrics, and the differences of config, plan and versions."""
    names = label_runs(runs)
    labeled = dict(zip(names, runs, strict=True))
    config = [omit_names(flatten(run.config)) for run in runs]
    plan = [flatten(_omit(run.history.plan, _OMITTED_PLAN)) for run in runs]
    versions = [run.history.versions for run in runs]
    sections = [
        Section("figures", "Figures", {"table": _compare_figures(labeled)}),
        curves_section(labeled),
        metrics_section(labeled),
        Section("config", "Config", compare_values("setting", names, config), "differences"),
        Section("plan", "Plan", compare_values("decision", names, plan), "differences"),
        Section("versions", "Versions", compare_values("library", names, versions), "differences"),
    ]
    if all(run.script is not None for run in runs):
        # Plain scripts report no steps, and have neither a plan nor a config.
        sections = [sections[0], sections[-1]]
    return [section for section in sections if section is not None]


def label_runs(runs: Sequence[Run]) -> list[str]:
    """The names of the runs, with a letter or a number where they are equal."""
    counts = Counter(run.name for run in runs)
    return [
        run.name if counts[run.name] == 1 else f"{run.name} ({chr(65 + i) if i < 26 else i + 1})"
        for i, run in enumerate(runs)
    ]


def _compare_figures(runs: Mapping[str, Run]) -> Table:
    found = [{figure.label: figure for figure in list_figures(run)} for run in runs.values()]
    names, rows, marked = list(runs), list[tuple[Any, ...]](), list[int]()
    for label in dict.fromkeys(label for each in found for label in each):
        figures = [each.get(label) for each in found]
        cells = ({"text": f.value, "note": f.note} if f else "\u2013" for f in figures)
        relations = [_describe_difference(figures[0], other) for other in figures[1:]]
        if any(relation not in ("", "same", "near") for relation in relations):
            marked.append(len(rows))
        rows.append((label, *cells, *(relations if len(runs) == 2 else ())))
    head = ("", *names, *((f"{names[1]} relative to {names[0]}",) if len(runs) == 2 else ()))
    terms = {"highlighted rows": f"the runs differ by {_NEAR:.0%} or more"}
    if len(runs) == 2:
        terms["near"] = f"a difference below {_NEAR:.0%}"
    return Table("Main figures", head, rows, marked=marked, terms=terms)


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


def _color(position: int) -> dict[str, Any]:
    return {"series": position, "is_background": position >= MOST_COLORED}


def curves_section(runs: Mapping[str, Run]) -> Section:
    """Loss, learning rate, loss scale and step time; the first runs have a color each."""
    losses: list[Curve] = []
    for position, (name, run) in enumerate(runs.items()):
        if (loss := find_loss(run.metrics)) is not None:
            lines = run.metrics[loss].lines
            label = f"{name}: {loss}" if position < MOST_COLORED else ""
            losses.append(Curve(label, lines, trend=True, **_color(position)))
        if position < MOST_COLORED and (loss := find_validation_loss(run.metrics)) is not None:
            losses.append(Curve(f"{name}: {loss}", run.metrics[loss].lines, points=True, **_color(position)))

    def curves(line_of: Callable[[AttemptRecord], Line], *, trend: bool = False) -> list[Curve]:
        return [
            Curve(name if i < MOST_COLORED else "", [line_of(a) for a in run.history.attempts], trend, **_color(i))
            for i, (name, run) in enumerate(runs.items())
        ]

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
    view = {"plots": drawn, "others": max(len(runs) - MOST_COLORED, 0), "colored": MOST_COLORED}
    return Section("curves", "Loss, learning rate and speed", view)


def metrics_section(runs: Mapping[str, Run]) -> Section | None:
    """Every metric of any run: a plot with all runs, and a table; None without a metric."""
    names = [
        name for group in group_metrics([name for run in runs.values() for name in run.metrics]) for name in group.names
    ]
    if not names:
        return None
    plots: list[SmallPlot] = []
    for number, name in enumerate(names[:_MOST_PLOTS]):
        curves = [
            Curve(label if i < MOST_COLORED else "", to_curve(run.metrics[name], "").lines,
                  points=run.metrics[name].is_sparse, **_color(i))
            for i, (label, run) in enumerate(runs.items()) if name in run.metrics
        ]  # fmt: skip
        axes = CurveAxes(f"metric-{number}", name, "", 1.9, is_small=True, points=100)
        missing = [label for label, run in runs.items() if name not in run.metrics]
        caption = f"Not logged by {', '.join(missing)}." if missing else "Logged by all runs."
        plots.append(SmallPlot(name, draw_curves(axes, curves), caption))
    rows = [(name, *(_format_metric(run, name) for run in runs.values())) for name in names]
    table = Table("Last value of each metric, with the lowest and the highest", ("metric", *runs), rows)
    view = {**arrange(plots), "count": len(names), "table": table, "not_shown": max(len(names) - _MOST_PLOTS, 0)}
    return Section("metrics", "Metrics", view, "compared_metrics")


def _format_metric(run: Run, name: str) -> dict[str, str] | str:
    summary = summarize_metric(run.metrics[name]) if name in run.metrics else None
    if summary is None:
        return "\u2013"
    both = (summary.lowest, summary.highest)
    ends = [format_number(point[0]) for point in both if point is not None]
    return {"text": format_number(summary.last[0]), "note": " to ".join(ends) if summary.count > 1 else ""}


def _first_learning_rate(attempt: AttemptRecord) -> Line:
    return next(iter(series.learning_rate_lines(attempt)), series.make_line(()))


def omit_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the settings that differ between any two runs."""
    return _omit(config, _OMITTED_CONFIG)


def _omit(values: Mapping[str, Any], omitted: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in omitted}


def compare_values(kind: str, names: Sequence[str], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table of the values that differ, and one of the equal values; each None if it is empty."""
    keys = list(dict.fromkeys(key for each in values for key in each))
    equal = [key for key in keys if all(key in each and each[key] == values[0][key] for each in values)]
    differ = [(key, *(_format_cell(each, key) for each in values)) for key in keys if key not in set(equal)]
    same = [(key, _format_cell(values[0], key)) for key in equal]
    kinds = "keys" if len(names) == 2 else "keys many"
    shared = "both" if len(names) == 2 else "all"
    return {
        "differ": Table("Differences", (kind, *names), differ, kind=kinds) if differ else None,
        "same": Table(f"Equal in {shared} runs", (kind, shared), same, kind="keys") if same else None,
        "count": f"{len(same)} equal in {shared} runs",
        "runs": len(names),
    }


def _format_cell(values: Mapping[str, Any], key: str) -> str | list[str]:
    value = values.get(key)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(entry, str) for entry in value):
            return list(value)
        if all(isinstance(entry, Mapping) for entry in value):
            return [", ".join(f"{k} {format_value(v)}" for k, v in entry.items()) for entry in value]
    return format_value(value) if key in values else "not set"
