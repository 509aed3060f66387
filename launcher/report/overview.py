"""The top of the page: how the run stands, its figures, what went wrong and what was alarming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.report import units
from launcher.report.markup import Html, Section, badge, element, facts, folded, join, listed, paragraph, table, text
from launcher.report.plain import mapping, number
from launcher.report.records import History, Outcome
from launcher.report.series import main_metric, rank_names, skipped_steps, summarize_ranks, validation_metric
from launcher.report.source import Run

BADGES: Mapping[Outcome, tuple[str, str]] = {
    "finished": ("finished", "good"),
    "failed": ("failed", "bad"),
    "interrupted": ("stopped", "warn"),
    "running": ("still running", "quiet"),
    "unknown": ("ended without a word", "bad"),
}
_MOST_LINES = 300
_FIRST_ALERTS = 10


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the figures at the top.

    Attributes:
        label: what it is.
        value: as it is shown.
        note: a few words more; may be empty.
        amount: the number behind it; None if it is none.
    """

    label: str
    value: str
    note: str = ""
    amount: float | None = None


def header_of(run: Run) -> Html:
    """The run's name, how it stands, and its figures."""
    history = run.history
    label, kind = BADGES[history.outcome] if history.attempts else ("nothing recorded", "quiet")
    began = f"began {units.moment(history.attempts[0].started)}, " if history.attempts else ""
    return join(
        element("h1", run.name, " ", badge(label, kind)),
        paragraph(f"{began}{run.path}", class_="sub"),
        listed([text(problem) for problem in run.problems], "notes"),
        facts([(figure.label, figure.value, figure.note) for figure in figures_of(run)]),
    )


def figures_of(run: Run) -> list[Figure]:
    """What matters most."""
    history, plan = run.history, run.history.plan
    whole = sum(a.seconds for a in history.attempts)
    restarts, twice = max(len(history.attempts) - 1, 0), history.lost_steps
    step_time, skipped = history.seconds_per_step, skipped_steps(history)
    peaks = [s.peak_memory for s in summarize_ranks(history) if s.peak_memory is not None]
    strategy = mapping(plan.get("strategy")).get("name", "\u2013")
    figures = [
        Figure("optimizer steps", units.count(history.last_step),
               f"{units.many(twice, 'step')} done twice" if twice else "", history.last_step),
        Figure("time in attempts", units.duration(whole), units.many(restarts, "restart") if restarts else "", whole),
        Figure("time a step", units.duration(step_time), "median", step_time),
        *_metric_figures(history),
        Figure("precision", str(plan.get("precision", "\u2013"))),
        Figure("strategy", str(strategy), _ranks_note(plan)),
    ]  # fmt: skip
    if skipped is not None:
        figures.append(Figure("skipped steps", units.count(skipped), "gradients not finite", skipped))
    if peaks:
        figures.append(Figure("peak memory", units.size(max(peaks)), "of one rank", max(peaks)))
    figures.append(Figure("alerts", units.count(len(history.alerts)), "", len(history.alerts)))
    return figures


def _metric_figures(history: History) -> list[Figure]:
    main = main_metric(history)
    validated = validation_metric(history, main)
    logged = [s.metrics for a in history.attempts for s in a.steps]
    after = [v.metrics for a in history.attempts for v in a.validations]
    figures: list[Figure] = []
    for name, values in ((main, logged), (validated, after)):
        told = [v[name] for v in values if name in v] if name is not None else []
        if name is not None and told:
            lowest = min((v for v in told if v == v), default=told[-1])
            figures.append(Figure(name, units.number(told[-1]), f"last; lowest {units.number(lowest)}", told[-1]))
    return figures


def failure_section(run: Run) -> Section | None:
    """Why the run failed, with the last lines of the rank that began it; None if it did not."""
    history = run.history
    if history.outcome not in ("failed", "unknown") or not history.attempts:
        return None
    last = history.attempts[-1]
    said = last.detail or (
        f"Nothing was written after {units.moment(last.last_event)}, at step {units.count(last.end_step)}: the process "
        "was killed (out of memory, a cluster's time limit, kill -9), or the machine went away."
    )
    parts: list[Any] = [paragraph(element("strong", said))]
    if run.log:
        parts += [paragraph(f"The last lines of {run.log_file}:"), element("pre", "\n".join(run.log), tabindex="0")]
    if any(a.checkpoints for a in history.attempts):
        again = f"launcher fit --config {run.path / 'config.yaml'} --resume auto"
        parts.append(paragraph("Go on from the last checkpoint: ", element("code", again)))
    return Section("failure", "What went wrong" if last.detail else "How it ended", join(*parts))


def alerts_section(history: History) -> Section | None:
    """What was alarming; None if nothing was."""
    if not history.alerts:
        return None
    rows = [
        (units.count(a.step), units.moment(a.time), rank_names(a.ranks) if a.ranks else "\u2013", a.title, a.text)
        for a in history.alerts[:_MOST_LINES]
    ]
    head = ("step", "time", "ranks", "what", "seen, and what to do")

    def part(chosen: list[tuple[str, ...]], caption: str) -> Html:
        return table(head, chosen, caption, numeric=(0,), whole=(1, 2, 3))

    first, rest = rows[:_FIRST_ALERTS], rows[_FIRST_ALERTS:]
    parts = [part(first, "What was wrong while it trained, told once until it was over")]
    if rest:
        parts.append(folded(f"{units.many(len(history.alerts) - len(first), 'more alert')}", part(rest, "More alerts")))
    return Section("alerts", "Alerts", join(*parts))


def _ranks_note(plan: Mapping[str, Any]) -> str:
    size, nodes = number(plan.get("world_size")), number(plan.get("num_nodes"))
    if size is None:
        return ""
    return units.many(int(size), "rank") + (f" on {int(nodes)} nodes" if nodes and nodes > 1 else "")
