"""The parts of the page about one run, in their order: a `Run` in, sections out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from launcher.config.schema import RunConfig, WatchOptions
from launcher.core.event_text import format_value
from launcher.core.nested import flatten
from launcher.jobs.peak_memory import PeakMemory
from launcher.report import series
from launcher.report.goodput import goodput_section
from launcher.report.metric_sections import loss_section, metrics_section
from launcher.report.overview import BADGES, alerts_section, command_section, failure_section
from launcher.report.page import Section, Table
from launcher.report.plots import MOST_ATTEMPTS, Curve, CurveAxes, draw_attempts, draw_curves
from launcher.report.rank_plots import draw_loss_scale, draw_memory, draw_rank_bars, draw_rank_times
from launcher.report.records import AttemptRecord
from launcher.report.series import RankSummary
from launcher.report.source import MEMORY_PARTS, Run, conform
from launcher.report.units import (
    format_bytes,
    format_count,
    format_duration,
    format_milliseconds,
    format_plural,
    format_time,
)

_MOST_LINES = 300
# Ranks in a bar chart; a table has more.
_MOST_BARS = 16
_MOST_ROWS = 64
_ATTEMPT_TERMS = {
    "to first step": "from the start of the ranks to the end of the first optimizer step",
    "repeated": "steps that the next attempt did again, as they came after the checkpoint that it resumed from",
}
_RANK_TERMS = {
    "step": "wall time of an optimizer step",
    "data": "the part that waits for a batch",
    "own": "data and forward pass, without waiting for other ranks",
    "\u00d7 others": "own time divided by the median of the other ranks",
    "slowest": "share of the intervals in which the rank had the longest own time",
    "skipped": "optimizer steps skipped because gradients were not finite",
}


def list_sections(run: Run) -> list[Section]:
    """All sections that apply to a run."""
    makers = (failure_section, alerts_section, loss_section, metrics_section, _scale_section, _ranks_section,
              _memory_section, goodput_section, _attempts_section, _precision_section, _plan_section, _config_section,
              _versions_section)  # fmt: skip
    if run.script is not None:
        # It reports no steps, and has neither a plan nor a config.
        makers = (failure_section, command_section, alerts_section, _attempts_section, _versions_section)
    return [section for make in makers if (section := make(run)) is not None]


def _scale_section(run: Run) -> Section:
    """The loss scale of all ranks, with skipped steps."""
    history = run.history
    groups = series.group_by_loss_scale(history.rank_tables)
    if not groups:
        return Section("scale", "Loss scale", {"plan": run.plan}, "no_scale")
    skips = [skip for a in history.attempts if a.rank_table for skip in series.find_skips(a.rank_table, a.start_step)]
    scales = np.concatenate([line.values for _, lines in groups for line in lines])
    finite = scales[np.isfinite(scales)]
    rows = [(f"{s.before + 1:,} to {s.step:,}", format_count(s.count)) for s in skips[:_MOST_ROWS]]
    is_cut = len(skips) > _MOST_ROWS
    caption = f"The first {_MOST_ROWS} of {len(skips)} intervals" if is_cut else "Skipped steps"
    floor = _read_watch_options(run).floor
    view = {
        "plot": draw_loss_scale(groups, skips, history.restart_steps, floor),
        "groups": len(groups),
        "ranks": sum(len(ranks) for ranks, _ in groups),
        "skipped": sum(skip.count for skip in skips),
        "range": (finite.min(), finite.max()) if len(finite) else None,
        "skips": Table(caption, ("steps", "skipped"), rows, (1,)) if rows else None,
    }
    return Section("scale", "Loss scale", view)


def _read_watch_options(run: Run) -> WatchOptions:
    """The limits of the alerts; the default where the config has none."""
    limits = conform(run.config.get("watch"), {"floor": float, "slow_factor": float, "slow_share": float})
    return WatchOptions(**{name: limit for name, limit in limits.items() if limit is not None})


def _ranks_section(run: Run) -> Section:
    """Step time of all ranks, with the stragglers."""
    history, lines = run.history, [series.step_time_line(a) for a in run.history.attempts]
    times = np.concatenate([line.values for line in lines] or [np.array([])])
    summaries = series.summarize_ranks(history)
    slow = series.find_stragglers(summaries, _read_watch_options(run))
    by_own_time = sorted(summaries, key=lambda s: -s.own_seconds if math.isfinite(s.own_seconds) else 0.0)
    axes = CurveAxes("time", "Step time", "ms a step", 2.4, "time")
    curve = Curve("optimizer step, rank 0", lines, trend=True)
    view = {
        "plot": draw_curves(axes, [curve], history.restart_steps) if len(times) else None,
        "median": float(np.median(times)) / 1e3 if len(times) else None,
        "slowest_interval": float(times.max()) / 1e3 if len(times) else None,
        "slow": slow,
        "own": None,
        "count": len(summaries),
        "most": _MOST_BARS,
        "table": _rank_table(summaries, slow, run.peak_memory) if summaries else None,
    }
    if len(summaries) > 1:
        first = by_own_time[0]
        bars = sorted(by_own_time[:_MOST_BARS], key=lambda s: s.rank)
        own = draw_rank_times(history.rank_tables, slow or [first.rank], history.restart_steps)
        often = max(by_own_time, key=lambda s: s.share_slowest)
        view |= {"own": own, "first": first, "often": often, "bars": draw_rank_bars(bars)}
    return Section("ranks", "Step time and ranks", view)


def _rank_table(summaries: Sequence[RankSummary], slow: Sequence[int], peak: PeakMemory) -> Table:
    shown = sorted(summaries, key=lambda s: (s.rank not in slow, s.rank))[:_MOST_ROWS]
    rows = [
        ({"text": f"rank {s.rank}", "after": ("straggler", "bad") if s.rank in slow else None},
         format_milliseconds(s.step_seconds), format_milliseconds(s.data_seconds), format_milliseconds(s.own_seconds),
         "\u2013" if math.isnan(s.own_factor) else f"{s.own_factor:.2f}", f"{s.share_slowest:.0%}",
         format_count(s.skipped_steps), format_bytes(peak.by_rank.get(s.rank)))
        for s in shown
    ]  # fmt: skip
    head = ("rank", "step (ms)", "data (ms)", "own (ms)", "\u00d7 others", "slowest", "skipped", "peak memory")
    caption = "Medians over all intervals"
    terms = {**_RANK_TERMS, "peak memory": peak.what}
    if len(summaries) > len(rows):
        caption += f"; {len(rows)} of {len(summaries)} ranks"
    return Table(caption, head, rows, range(1, 8), marked=[i for i, s in enumerate(shown) if s.rank in slow],
                 terms=terms)  # fmt: skip


def _memory_section(run: Run) -> Section:
    """Planned memory and measured peak memory."""
    plan, planned = run.plan, _read_planned_memory(run)
    peaks = {rank: float(peak) for rank, peak in run.peak_memory.by_rank.items()}
    measured = next((a.memory for a in reversed(run.history.attempts) if a.memory is not None), None)
    if measured is not None:
        peaks = {rank: float(peak) for rank, peak in measured.measured.items()}
    if not peaks and not planned and measured is None:
        return Section("memory", "Memory", {}, "no_memory")
    highest = sorted(peaks, key=lambda rank: -peaks[rank])[:_MOST_BARS]
    limit = plan["memory"]["limit_bytes"]
    parts = {name.replace("_", " "): amount for name, amount in planned.items() if amount}
    view = {
        "plot": draw_memory(parts, {rank: peaks[rank] for rank in sorted(highest)}, limit),
        "peak": peaks[highest[0]] if highest else None,
        "peak_rank": highest[:1],
        "planned": sum(planned.values()) if planned else None,
        "method": plan["memory"]["method"] or "estimated",
        "limit": limit,
        "count": len(peaks),
        "most": _MOST_BARS,
        "is_cpu": plan["device_kind"] == "cpu",
        "measured_by": run.peak_memory.what if measured is None else measured.method,
        "highest": run.peak_memory,
        "table": None,
    }
    if measured is not None:
        rows = [
            (f"rank {rank}", format_bytes(measured.planned), format_bytes(peak),
             f"{peak / measured.planned:.0%}" if measured.planned else "\u2013")
            for rank, peak in list(measured.measured.items())[:_MOST_ROWS]
        ]  # fmt: skip
        head = ("rank", "planned", "measured", "of the plan")
        terms = {"planned": "the sum of the parts in the plot", "measured": measured.method,
                 "of the plan": "measured divided by planned"}  # fmt: skip
        view["table"] = Table("Planned and measured memory", head, rows, range(1, 4), terms=terms)
    return Section("memory", "Memory", view)


def _read_planned_memory(run: Run) -> dict[str, float]:
    """Bytes of a rank by part, for the strategy of the plan; empty without an estimate."""
    plan = run.plan
    for assessment in plan["memory"]["assessments"]:
        if assessment["name"] == plan["strategy"]["name"]:
            return {part: size for part in MEMORY_PARTS if (size := assessment["memory"][part]) is not None}
    return {}


def _attempts_section(run: Run) -> Section | None:
    history, attempts = run.history, run.history.attempts
    if not attempts:
        return None
    repeated, lines = history.repeated_steps, [line for a in attempts for line in a.lines]
    rows: list[tuple[Any, ...]] = [
        (f"{a.number}", format_time(a.started), format_duration(a.seconds),
         format_duration(None if a.first_step_time is None else a.first_step_time - a.started),
         _describe_steps(a), format_count(repeated.get(a.number, 0)),
         {"badge": BADGES[a.outcome], "text": "" if a.outcome == "finished" else a.detail})
        for a in attempts[-_MOST_LINES:]
    ]  # fmt: skip
    head: Sequence[str] = ("attempt", "started", "duration", "to first step", "steps", "repeated", "end")
    is_script = run.script is not None
    if is_script:
        head, rows = (*head[:3], head[-1]), [(*row[:3], row[-1]) for row in rows]
    events = [
        (format_time(line.time), f"rank {line.rank}", format_count(line.step), line.text)
        for line in lines[-_MOST_LINES:]
    ]
    view = {
        "plot": draw_attempts(attempts, has_steps=not is_script),
        "count": len(attempts),
        "most": MOST_ATTEMPTS,
        "seconds": attempts[-1].last_event - attempts[0].started,
        "table": Table(
            "All attempts",
            head,
            rows,
            (2,) if is_script else (2, 3, 5),
            (0, 1) if is_script else (0, 1, 4),
            terms={} if is_script else _ATTEMPT_TERMS,
        ),
        "events": Table("Events", ("time", "reported by", "step", "event"), events, (2,), (0, 1), kind="log"),
        "shown_events": len(events),
        "all_events": len(lines),
    }
    return Section("attempts", "Attempts" if is_script else "Restarts and preemptions", view)


def _describe_steps(attempt: AttemptRecord) -> str:
    if attempt.start_step is None or attempt.end_step is None:
        return "no step"
    return f"{attempt.start_step:,} to {attempt.end_step:,}"


def _precision_section(run: Run) -> Section | None:
    if not run.plan["precision"]:
        return None
    view = {"plan": run.plan, "requested": run.config.get("precision", "auto"), "use_amp": run.config.get("use_amp")}
    return Section("precision", "Precision", view)


def _plan_section(run: Run) -> Section:
    if not run.history.plan:
        return Section("plan", "Plan", {}, "no_plan")
    plan, strategy = run.plan, run.plan["strategy"]
    devices = ", ".join(f"{count} \u00d7 {name}" for name, count in plan["devices"].items())
    rows: list[tuple[Any, ...]] = [
        ("ranks", format_count(plan["world_size"]), devices),
        ("nodes", format_count(plan["num_nodes"]), ", ".join(plan["hosts"])),
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


def _config_section(run: Run) -> Section:
    given, default = flatten(run.config), flatten(RunConfig().to_dict())
    changed = [(k, format_value(v)) for k, v in given.items() if k not in default or default[k] != v]
    unchanged = [(k, format_value(v)) for k, v in given.items() if k in default and default[k] == v]
    head = ("setting", "value")
    view = {
        "changed": Table("Settings that differ from the default", head, changed, kind="keys") if given else None,
        "unchanged": Table("Settings at the default", head, unchanged, kind="keys"),
        "title": f"{format_plural(len(unchanged), 'setting')} at the default",
    }
    return Section("config", "Config", view)


def _versions_section(run: Run) -> Section:
    recorded = [a for a in run.history.attempts if a.versions]
    # One column for each attempt with other versions than the one before.
    changed = [a for i, a in enumerate(recorded) if i == 0 or dict(a.versions) != dict(recorded[i - 1].versions)]
    names = dict.fromkeys(name for a in changed for name in a.versions)
    rows = [(name, *(a.versions.get(name, "not installed") for a in changed)) for name in names]
    head = ("library", *(f"from attempt {a.number}" if len(changed) > 1 else "version" for a in changed))
    marked = [i for i, row in enumerate(rows) if len(set(row[1:])) > 1]
    table = Table("Libraries of rank 0", head, rows, marked=marked) if recorded else None
    return Section("versions", "Versions", {"table": table})
