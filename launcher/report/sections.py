"""The parts of the page about one run, in their order: a `Run` in, sections out."""

from __future__ import annotations

import math
from typing import Any

from launcher.config.schema import RunConfig
from launcher.core.nested import flatten
from launcher.report import series, units
from launcher.report.overview import BADGES, alerts_section, failure_section
from launcher.report.page import Section, Table
from launcher.report.plots import MOST_ATTEMPTS, Curve, CurveAxes, draw_attempts, draw_curves
from launcher.report.rank_sections import memory_section, ranks_section, scale_section
from launcher.report.records import AttemptRecord
from launcher.report.source import Run

_MOST_LINES = 300
_MOST_GROUPS = 6


def list_sections(run: Run) -> list[Section]:
    """All sections that apply to a run."""
    makers = (failure_section, alerts_section, _loss, scale_section, ranks_section, memory_section, _attempts,
              _precision, _plan, _config, _versions)  # fmt: skip
    return [section for make in makers if (section := make(run)) is not None]


def _loss(run: Run) -> Section:
    history, loss = run.history, series.find_loss(run.history)
    if loss is None:
        return Section("loss", "Loss and learning rate", {"steps": history.last_step}, "no_loss")
    curves = [Curve(loss, [series.metric_line(a.steps, loss) for a in history.attempts], trend=True)]
    if (name := series.find_validation_loss(history)) is not None:
        curves.append(Curve(name, [series.metric_line(a.validations, name) for a in history.attempts], points=True))
    logged = [(s.metrics[loss], s.step) for a in history.attempts for s in a.steps if loss in s.metrics]
    groups = [series.learning_rate_lines(a) for a in history.attempts]
    width = max(map(len, groups))
    rates = [
        Curve(f"parameter group {i + 1}" if width > 1 else "learning rate", [g[i] for g in groups if i < len(g)])
        for i in range(min(width, _MOST_GROUPS))
    ]
    every_rate = [rate for a in history.attempts for s in a.steps for rate in s.learning_rates]
    # The metric's own name is in the legend.
    axes = CurveAxes("loss", "Loss", "loss" if "loss" in loss.lower() else "value")
    rate_axes = CurveAxes("rate", "Learning rate", "learning rate", height=1.9)
    view = {
        "plot": draw_curves(axes, curves, history.restart_steps),
        "name": loss,
        "first": logged[0][0],
        "last": logged[-1][0],
        "lowest": min((pair for pair in logged if math.isfinite(pair[0])), default=None),
        "has_trend": any(len(line.steps) > 30 for line in curves[0].lines),
        "rates": draw_curves(rate_axes, rates, history.restart_steps) if rates else None,
        "rate_range": (min(every_rate), max(every_rate)) if rates else None,
    }
    return Section("loss", "Loss and learning rate", view)


def _attempts(run: Run) -> Section | None:
    history, attempts = run.history, run.history.attempts
    if not attempts:
        return None
    repeated, lines = history.repeated_steps, [line for a in attempts for line in a.lines]
    rows: list[tuple[Any, ...]] = [
        (f"{a.number}", units.format_time(a.started), units.format_duration(a.seconds),
         units.format_duration(None if a.first_step_time is None else a.first_step_time - a.started),
         _describe_steps(a), units.format_count(repeated.get(a.number, 0)),
         {"badge": BADGES[a.outcome], "text": "" if a.outcome == "finished" else a.detail})
        for a in attempts[-_MOST_LINES:]
    ]  # fmt: skip
    head = ("attempt", "started", "duration", "to first step", "steps", "repeated", "end")
    events = [
        (units.format_time(line.time), f"rank {line.rank}", units.format_count(line.step), line.text)
        for line in lines[-_MOST_LINES:]
    ]
    view = {
        "plot": draw_attempts(attempts),
        "count": len(attempts),
        "most": MOST_ATTEMPTS,
        "seconds": attempts[-1].last_event - attempts[0].started,
        "table": Table("All attempts", head, rows, (2, 3, 5), (1, 4)),
        "events": Table("Events", ("time", "reported by", "step", "event"), events, (2,), (0, 1), kind="log"),
        "shown_events": len(events),
        "all_events": len(lines),
    }
    return Section("attempts", "Restarts and preemptions", view)


def _describe_steps(attempt: AttemptRecord) -> str:
    if attempt.start_step is None or attempt.end_step is None:
        return "no step"
    return f"{attempt.start_step:,} to {attempt.end_step:,}"


def _precision(run: Run) -> Section | None:
    if not run.plan["precision"]:
        return None
    view = {"plan": run.plan, "requested": run.config.get("precision", "auto"), "use_amp": run.config.get("use_amp")}
    return Section("precision", "Precision", view)


def _plan(run: Run) -> Section:
    if not run.history.plan:
        return Section("plan", "Plan", {}, "no_plan")
    plan, strategy = run.plan, run.plan["strategy"]
    devices = ", ".join(f"{count} \u00d7 {name}" for name, count in plan["devices"].items())
    rows: list[tuple[Any, ...]] = [
        ("ranks", units.format_count(plan["world_size"]), devices),
        ("nodes", units.format_count(plan["num_nodes"]), ", ".join(plan["hosts"])),
        ("strategy", strategy["name"] or "\u2013", strategy["reasons"]),
        ("batch", plan["batch"]["global_batch_size"] or "batch size of the loader", plan["batch_reasons"]),
    ]
    rejected = [(candidate["name"], candidate["reason"]) for candidate in strategy["rejected"]]
    view = {
        "chosen": Table("What the run trained with", ("", "chosen", "reasons"), rows),
        "rejected": Table("Rejected strategies", ("strategy", "reason"), rejected) if rejected else None,
        "notices": plan["notices"],
    }
    return Section("plan", "Plan", view)


def _config(run: Run) -> Section:
    given, default = flatten(run.config), flatten(RunConfig().to_dict())
    changed = [(k, units.format_setting(v)) for k, v in given.items() if k not in default or default[k] != v]
    unchanged = [(k, units.format_setting(v)) for k, v in given.items() if k in default and default[k] == v]
    head = ("setting", "value")
    view = {
        "changed": Table("Settings that differ from the default", head, changed, kind="keys") if given else None,
        "unchanged": Table("Settings at the default", head, unchanged, kind="keys"),
        "title": f"{units.format_plural(len(unchanged), 'setting')} at the default",
    }
    return Section("config", "Config", view)


def _versions(run: Run) -> Section:
    recorded = [a for a in run.history.attempts if a.versions]
    # One column for each attempt with other versions than the one before.
    changed = [a for i, a in enumerate(recorded) if i == 0 or dict(a.versions) != dict(recorded[i - 1].versions)]
    names = dict.fromkeys(name for a in changed for name in a.versions)
    rows = [(name, *(a.versions.get(name, "not installed") for a in changed)) for name in names]
    head = ("library", *(f"from attempt {a.number}" if len(changed) > 1 else "version" for a in changed))
    marked = [i for i, row in enumerate(rows) if len(set(row[1:])) > 1]
    table = Table("Libraries of rank 0", head, rows, marked=marked) if recorded else None
    return Section("versions", "Versions", {"table": table})
