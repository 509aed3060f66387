"""Main figures of a run, for the page and `report --json`, and the first sections: why it failed, its alerts."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report import units
from launcher.report.metrics import find_loss, find_validation_loss, summarize_metric, to_metric_values
from launcher.report.page import Section, Table
from launcher.report.records import AlertRecord, AttemptRecord, Outcome
from launcher.report.series import count_skipped_steps
from launcher.report.source import Run

BADGES: Mapping[Outcome, tuple[str, str]] = {
    "finished": ("finished", "good"),
    "failed": ("failed", "bad"),
    "interrupted": ("stopped", "warn"),
    "running": ("still running", "quiet"),
    "unknown": ("ended without a record", "bad"),
}
_MOST_ALERTS = 300
_FIRST_ALERTS = 10


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the figures at the top; `amount` is its value as a number, None if it is not one."""

    label: str
    value: str
    note: str = ""
    amount: float | None = None


def list_figures(run: Run) -> list[Figure]:
    """The figures of a run."""
    history, plan = run.history, run.plan
    if run.script is not None:
        return _list_script_figures(run, run.script)
    seconds = sum(a.seconds for a in history.attempts)
    restarts, repeated = max(len(history.attempts) - 1, 0), sum(history.repeated_steps.values())
    step_time, skipped = history.seconds_per_step, count_skipped_steps(history)
    ranks, nodes = plan["world_size"], plan["num_nodes"] or 1
    on_nodes = f" on {nodes:.0f} nodes" if nodes > 1 else ""
    ranks_note = "" if ranks is None else units.format_plural(int(ranks), "rank") + on_nodes
    figures = [
        Figure("optimizer steps", units.format_count(history.last_step),
               f"{units.format_plural(repeated, 'step')} repeated" if repeated else "", history.last_step),
        Figure("time in attempts", units.format_duration(seconds),
               units.format_plural(restarts, "restart") if restarts else "", seconds),
        *_goodput_figures(run),
        Figure("time a step", units.format_duration(step_time), "median", step_time),
        *_metric_figures(run),
        Figure("precision", plan["precision"] or "\u2013"),
        Figure("strategy", plan["strategy"]["name"] or "\u2013", ranks_note),
    ]  # fmt: skip
    if skipped is not None:
        figures.append(Figure("skipped steps", units.format_count(skipped), "gradients not finite", skipped))
    peak = run.peak_memory
    if peak.highest is not None:
        figures.append(
            Figure("peak memory", units.format_bytes(peak.highest), f"of one rank; {peak.what}", peak.highest)
        )
    figures.append(Figure("alerts", units.format_count(len(history.alerts)), "", len(history.alerts)))
    return figures


def _goodput_figures(run: Run) -> list[Figure]:
    ledger = run.status.goodput
    if ledger is None or ledger.ratio is None:
        return []
    failures = units.format_plural(len(ledger.failures), "failure")
    note = f"{failures} cost {units.format_duration(ledger.lost)}" if ledger.failures else "of the time"
    return [Figure("effective training", f"{ledger.ratio:.1%}", note, ledger.ratio)]


def _list_script_figures(run: Run, script: Mapping[str, Any]) -> list[Figure]:
    """What is known of a plain script, which reports no steps."""
    attempts, ranks = run.history.attempts, script.get("nproc_per_node")
    seconds, code = sum(a.seconds for a in attempts), attempts[-1].exit_code if attempts else None
    return [
        Figure("ranks on each node", units.format_count(ranks) if type(ranks) is int else str(ranks or "\u2013")),
        Figure("attempts", units.format_count(len(attempts)), "", len(attempts)),
        Figure("time in attempts", units.format_duration(seconds), "", seconds),
        Figure("exit code", "\u2013" if code is None else str(code), "", code),
    ]


def command_section(run: Run) -> Section | None:
    """The command of a plain script; None for another run."""
    script = run.script
    if script is None:
        return None
    target, arguments = str(script.get("target") or "?"), script.get("arguments")
    module = ["-m"] if script.get("kind") == "module" else []
    command = shlex.join([*module, target, *map(str, arguments if isinstance(arguments, list) else [])])
    rows = [("script and arguments", command), ("working directory", str(script.get("cwd") or "\u2013")),
            ("output of each rank", str(run.path / "logs" / "rank-<r>.log"))]  # fmt: skip
    return Section("command", "Command", {"table": Table("What was started", ("", ""), rows, kind="keys")}, "figures")


def _metric_figures(run: Run) -> list[Figure]:
    figures: list[Figure] = []
    for name in (find_loss(run.metrics), find_validation_loss(run.metrics)):
        summary = None if name is None else summarize_metric(run.metrics[name])
        if name is not None and summary is not None:
            last, lowest = summary.last[0], summary.lowest or summary.last
            note = f"last; lowest {units.format_number(lowest[0])}"
            figures.append(Figure(name, units.format_number(last), note, last))
    return figures


def to_values(run: Run) -> dict[str, Any]:
    """Outcome, figures, attempts and alerts of a run, as JSON values.

    Returns:
        Times in seconds since the epoch, durations in seconds, memory in bytes. A figure that is not a number is its
        text; one that is not finite is null.
    """
    history, repeated = run.history, run.history.repeated_steps
    return {
        "name": run.name,
        "path": str(run.path),
        "outcome": history.outcome,
        "ending": {name: getattr(run.status, name) for name in ("state", "reason", "detail", "advice", "command")},
        "steps": history.last_step,
        "figures": {f.label: f.value if f.amount is None else _finite_or_none(f.amount) for f in list_figures(run)},
        "peak_memory": {
            "highest": run.peak_memory.highest,
            "by_rank": {str(rank): peak for rank, peak in run.peak_memory.by_rank.items()},
            "of": run.peak_memory.what,
        },
        "goodput": None if run.status.goodput is None else run.status.goodput.to_dict(),
        "metrics": {name: to_metric_values(metric) for name, metric in run.metrics.items()},
        "attempts": [_attempt_values(attempt, repeated.get(attempt.number, 0)) for attempt in history.attempts],
        "alerts": [dataclasses.asdict(alert) for alert in history.alerts],
        "problems": list(run.problems),
    }


def _attempt_values(attempt: AttemptRecord, repeated: int) -> dict[str, Any]:
    names = ("number", "started", "seconds", "outcome", "detail", "failed_rank", "start_step", "end_step")
    values = {name: getattr(attempt, name) for name in names} | {"steps_done_again": repeated, "memory": None}
    if (memory := attempt.memory) is not None:
        measured = {str(rank): peak for rank, peak in memory.measured.items()}
        values["memory"] = {"planned": memory.planned, "measured": measured, "measured_by": memory.method}
    return values


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def failure_section(run: Run) -> Section | None:
    """The last lines of the rank that failed first; None if the run did not fail, or if it has no log."""
    if not run.log:
        return None
    return Section("failure", "What went wrong", {"log": run.log, "log_file": run.log_file})


def alerts_section(run: Run) -> Section | None:
    """The alerts; None if there are none."""
    alerts = run.history.alerts
    if not alerts:
        return None
    first, more = alerts[:_FIRST_ALERTS], alerts[_FIRST_ALERTS:_MOST_ALERTS]
    view = {
        "first": _alerts_table(first, "Alerts during training, reported once per occurrence"),
        "more": _alerts_table(more, "More alerts") if more else None,
        "count": len(alerts) - len(first),
    }
    return Section("alerts", "Alerts", view)


def _alerts_table(alerts: Sequence[AlertRecord], caption: str) -> Table:
    rows: list[tuple[Any, ...]] = [
        (units.format_count(a.step), units.format_time(a.time),
         units.format_ranks(a.ranks) if a.ranks else "\u2013", a.title, a.text)
        for a in alerts
    ]  # fmt: skip
    return Table(caption, ("step", "time", "ranks", "alert", "cause and advice"), rows, (0,), (1, 2, 3))
