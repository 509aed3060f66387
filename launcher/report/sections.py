"""The parts of the page about one run, from top to bottom. Pure: a `Run` goes in, sections come out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from launcher.config.schema import RunConfig
from launcher.core.nested import flatten
from launcher.report import units
from launcher.report.markup import (
    Section,
    badge,
    element,
    figure,
    folded,
    join,
    listed,
    paragraph,
    table,
)
from launcher.report.overview import BADGES, alerts_section, failure_section
from launcher.report.plain import items, mapping, number, shown, texts
from launcher.report.rank_sections import memory_section, ranks_section, scale_section
from launcher.report.records import AttemptRecord, History, lost_steps
from launcher.report.series import (
    learning_rate_lines,
    main_metric,
    metric_line,
    validation_line,
    validation_metric,
)
from launcher.report.source import Run

_MOST_LINES = 300


def sections_of(run: Run) -> list[Section]:
    """Everything there is to say of a run."""
    made = [
        failure_section(run), alerts_section(run.history), _loss(run), scale_section(run), ranks_section(run),
        memory_section(run), _attempts(run.history), _precision(run), _plan(run.history.plan), _config(run.config),
        _versions(run.history),
    ]  # fmt: skip
    return [section for section in made if section is not None]


def _loss(run: Run) -> Section:
    from launcher.report.plots import Curve, draw_curves

    history = run.history
    main = main_metric(history)
    if main is None:
        why = "No optimizer step was logged." if not history.last_step else "The model logged no metric (self.log)."
        return Section("loss", "Loss and learning rate", paragraph(why))
    curves = [Curve(main, [metric_line(a, main) for a in history.attempts], trend=True)]
    validated = validation_metric(history, main)
    if validated is not None:
        curves.append(Curve(validated, [validation_line(a, validated) for a in history.attempts], points=True))
    values = [s.metrics[main] for a in history.attempts for s in a.steps if main in s.metrics]
    said = f"{main} went from {units.number(values[0])} to {units.number(values[-1])}"
    told = [(s.metrics[main], s.step) for a in history.attempts for s in a.steps if main in s.metrics]
    finite = [(value, step) for value, step in told if math.isfinite(value)]
    if finite:
        said += f"; the lowest was {units.number(min(finite)[0])} at step {units.count(min(finite)[1])}"
    said += "."
    if any(len(line.steps) > 30 for line in curves[0].lines):
        said += " The thin line is what was logged, the thick one its trend."
    restarts = restart_steps(history)
    # The name itself stands in the legend.
    unit = "loss" if "loss" in main.lower() else "value"
    parts: list[Any] = [
        figure(draw_curves("loss", "Loss", said, unit, curves,
                           restarts=restarts), said)
    ]  # fmt: skip
    rates = [learning_rate_lines(a) for a in history.attempts]
    width = max(map(len, rates), default=0)
    if width:
        groups = [
            Curve("learning rate" if width == 1 else f"parameter group {i + 1}",
                  [lines[i] for lines in rates if i < len(lines)])
            for i in range(min(width, 6))
        ]  # fmt: skip
        every = [rate for a in history.attempts for s in a.steps for rate in s.learning_rates]
        said = f"The learning rate was between {units.number(min(every))} and {units.number(max(every))}."
        picture = draw_curves("rate", "Learning rate", said, "learning rate", groups, restarts=restarts, height=1.9)
        parts.append(figure(picture, said))
    else:
        parts.append(paragraph("The learning rate was not recorded: this run is of an older version."))
    return Section("loss", "Loss and learning rate", join(*parts))


def restart_steps(history: History) -> list[float]:
    """The step at which each later attempt went on."""
    return [float(a.start_step) for a in history.attempts[1:] if a.start_step is not None]


def _attempts(history: History) -> Section | None:
    from launcher.report.timeline import MOST_ATTEMPTS, draw_timeline

    if not history.attempts:
        return None
    attempts = history.attempts
    said = "; ".join(f"attempt {a.number}: {_end(a)}" for a in attempts[-8:]) + "."
    caption = f"{units.many(len(attempts), 'attempt')}" + (
        f", the last {MOST_ATTEMPTS} of them" if len(attempts) > MOST_ATTEMPTS else ""
    )
    caption += (
        f", {units.duration(attempts[-1].last_event - attempts[0].started)} from the first start to the last event."
    )
    lost = lost_steps(attempts)
    rows = [
        (f"{a.number}", units.moment(a.started), units.duration(a.seconds),
         units.duration(a.first_step_time - a.started) if a.first_step_time is not None else "\u2013",
         _steps_of(a), units.count(lost.get(a.number, 0)),
         join(badge(*BADGES[a.outcome]), "" if a.outcome == "finished" else f" {a.detail}"))
        for a in attempts[-_MOST_LINES:]
    ]  # fmt: skip
    head = ("attempt", "started", "lasted", "to first step", "steps", "done again", "end")
    told = [h for a in attempts for h in a.happenings]
    lines = [(units.moment(h.time), f"rank {h.rank}", units.count(h.step), h.text) for h in told[-_MOST_LINES:]]
    more = f"the last {_MOST_LINES} of {len(told):,} events" if len(told) > _MOST_LINES else f"{len(told)} events"
    return Section("attempts", "Restarts and preemptions", join(
        figure(draw_timeline("timeline", said, attempts), caption),
        table(head, rows, "Every start of the run", numeric=(2, 3, 5), whole=(1, 4)),
        folded(f"What happened ({more})", table(("time", "told by", "step", "what"), lines, "Events", numeric=(2,),
                                                whole=(0, 1), class_="log")),
    ))  # fmt: skip


def _end(attempt: AttemptRecord) -> str:
    return f"{BADGES[attempt.outcome][0]} after {units.duration(attempt.seconds)}, {_steps_of(attempt)}"


def _steps_of(attempt: AttemptRecord) -> str:
    if attempt.start_step is None or attempt.end_step is None:
        return "no step"
    return f"{attempt.start_step:,} to {attempt.end_step:,}"


def _precision(run: Run) -> Section | None:
    plan = run.history.plan
    if not plan.get("precision"):
        return None
    asked = run.config.get("precision", "auto")
    wish = run.config.get("use_amp")
    said = [f"Asked for: precision {asked}" + ("" if wish is None else f", use_amp {str(wish).lower()}") + "."]
    if plan.get("precision_before"):
        said.append(f"The checkpoint that it went on from was trained in {plan['precision_before']}.")
    said.append(
        "A gradient scaler multiplies the loss." if plan.get("has_loss_scale") else "No gradient scaler is needed."
    )
    return Section("precision", "Precision", join(
        paragraph(element("strong", str(plan["precision"])), " on every rank. ", " ".join(said)),
        element("h3", "Why"), listed(texts(plan.get("precision_reasons"))),
    ))  # fmt: skip


def _plan(plan: Mapping[str, Any]) -> Section:
    if not plan:
        return Section("plan", "Plan", paragraph("The run ended before it had a plan."))
    devices = ", ".join(f"{n} \u00d7 {name}" for name, n in mapping(plan.get("devices")).items())
    strategy, batch = mapping(plan.get("strategy")), mapping(plan.get("batch"))
    rows = [
        ("ranks", units.count(number(plan.get("world_size"))), devices),
        ("nodes", units.count(number(plan.get("num_nodes"))), ", ".join(texts(plan.get("hosts")))),
        ("strategy", strategy.get("name", "\u2013"), listed(texts(strategy.get("reasons")))),
        ("batch", batch.get("global_batch_size") or "the loader's own", listed(texts(plan.get("batch_reasons")))),
    ]  # fmt: skip
    rejected = [(mapping(r).get("name", ""), mapping(r).get("reason", "")) for r in items(strategy.get("rejected"))]
    parts: list[Any] = [table(("", "chosen", "why"), rows, "What was trained with")]
    if rejected:
        parts.append(table(("strategy", "why not"), rejected, "Strategies that were not taken"))
    notices = texts(plan.get("notices"))
    if notices:
        parts += [element("h3", "Notices"), listed(notices)]
    return Section("plan", "Plan", join(*parts))


def _config(config: Mapping[str, Any]) -> Section:
    if not config:
        return Section("config", "Config", paragraph("config.yaml could not be read."))
    given, default = flatten(config), flatten(RunConfig().to_dict())
    own = [(k, shown(v)) for k, v in given.items() if k not in default or default[k] != v]
    rest = [(k, shown(v)) for k, v in given.items() if k in default and default[k] == v]
    return Section("config", "Config", join(
        table(("setting", "value"), own, "Settings that differ from the default", class_="keys"),
        folded(f"{units.many(len(rest), 'setting')} at the default",
               table(("setting", "value"), rest, "Settings at the default", class_="keys")),
    ))  # fmt: skip


def _versions(history: History) -> Section:
    told = [a for a in history.attempts if a.versions]
    if not told:
        return Section("versions", "Versions", paragraph("Not recorded: this run is of an older version."))
    # One column for each attempt that found other versions than the one before.
    changed = [a for i, a in enumerate(told) if i == 0 or dict(a.versions) != dict(told[i - 1].versions)]
    names = list(dict.fromkeys(name for a in changed for name in a.versions))
    rows = [(name, *(a.versions.get(name, "not installed") for a in changed)) for name in names]
    marked = [i for i, row in enumerate(rows) if len(set(row[1:])) > 1]
    head = ("library", *(f"from attempt {a.number}" if len(changed) > 1 else "version" for a in changed))
    return Section("versions", "Versions", table(head, rows, "Libraries of rank 0", marked=marked))
