"""The page about a sweep: its members sorted by the monitored metric, their curves, and what differs."""

from __future__ import annotations

from typing import Any

from launcher.core.nested import flatten
from launcher.jobs.sweep import describe
from launcher.jobs.sweep_status import MemberStatus
from launcher.report.compare import compare_values, curves_section, metrics_section, omit_names
from launcher.report.page import Section, Table
from launcher.report.sweep_source import NOT_QUEUED, Sweep
from launcher.report.units import format_bytes, format_count, format_duration, format_number

_STATES = {"done": "good", "failed": "bad", "ended": "bad", "cancelled": "warn", "stopped": "warn"}
# Curves of more runs take long to read and to draw; the table has all of them.
_MOST_CURVES = 40


def list_sweep_sections(sweep: Sweep) -> list[Section]:
    """The table of members, curves, metrics, and the settings."""
    shown = {_label(member): sweep.runs[member.name] for member in sweep.members if member.name in sweep.runs}
    shown = dict(list(shown.items())[:_MOST_CURVES])
    sections = [Section("members", "Members", {"table": _member_table(sweep), "sweep": sweep})]
    if shown:
        config = [omit_names(flatten(run.config)) for run in shown.values()]
        differences = Section("config", "Config", compare_values("setting", list(shown), config), "differences")
        found = (curves_section(shown), metrics_section(shown), differences)
        sections += [section for section in found if section is not None]
    return sections


def _label(member: MemberStatus) -> str:
    return f"{member.index}: {describe(member.settings)}"


def _member_table(sweep: Sweep) -> Table:
    rows: list[tuple[Any, ...]] = []
    for member in sweep.members:
        status, run = member.status or NOT_QUEUED, sweep.runs.get(member.name)
        is_best = member is sweep.best
        time = None if run is None else run.history.seconds_per_step
        why = "" if status.state == "done" and status.reason != "early_stopping" else status.detail
        rows.append((
            {"text": str(member.index), "after": ("best", "good") if is_best else None},
            describe(member.settings), _format_value(member.best), _format_value(member.last),
            format_count(status.step), format_duration(time), format_bytes(status.peak_memory),
            {"badge": (status.state, _STATES.get(status.state, "quiet")), "text": why},
        ))  # fmt: skip
    better = "highest" if sweep.members[0].is_highest_best else "lowest"
    whats = {run.peak_memory.what for run in sweep.runs.values()}
    terms = {
        "member": f"number in the sweep; its run is {sweep.name}-NUMBER, for launcher report, logs and status",
        "best, last": f"values of {sweep.monitor}; the {better} is the best",
        "step": "optimizer steps done",
        "time": "of an optimizer step, median",
        "peak memory": "of the rank with the most" + (f"; {' or '.join(sorted(whats))}" if whats else ""),
    }
    head = ("member", "settings", f"best {sweep.monitor}", "last", "step", "time", "peak memory", "state")
    return Table(f"Sorted by {sweep.monitor}, the best first", head, rows, range(2, 7), (0,),
                 marked=[0] if sweep.best else (), terms=terms)  # fmt: skip


def _format_value(value: float | None) -> str:
    return "\u2013" if value is None else format_number(value)
