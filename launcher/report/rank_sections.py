"""The parts of the page about the ranks: loss scale, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launcher.config.schema import WatchOptions
from launcher.report import units
from launcher.report.markup import Section, badge, element, figure, folded, join, paragraph, table
from launcher.report.plain import items, mapping, number
from launcher.report.plots import Curve, draw_curves
from launcher.report.rank_plots import draw_loss_scale, draw_memory, draw_rank_bars, draw_rank_times
from launcher.report.records import MemoryEnd
from launcher.report.series import (
    Line,
    RankSummary,
    alike,
    rank_names,
    skips,
    step_time_line,
    summarize_ranks,
)
from launcher.report.source import Run

# Ranks with a row of their own in a picture; a table has more.
_MOST_BARS = 16
_MOST_ROWS = 64
_PARTS = {
    "parameters": "parameters", "gradients": "gradients", "optimizer_states": "optimizer states",
    "activations": "activations", "buffers": "buffers",
}  # fmt: skip


def scale_section(run: Run) -> Section:
    """The loss scale of all ranks, with skipped steps."""
    title = "Loss scale"
    attempts = run.history.attempts
    tables = [a.rank_table for a in attempts if a.rank_table is not None]
    told = [
        (table.steps, {r: v for r, v in table.column("loss_scale").items() if not np.isnan(v).all()})
        for table in tables
    ]
    if not any(ranks for _, ranks in told):
        precision = run.history.plan.get("precision")
        why = f" ({precision} needs none)" if precision and not run.history.plan.get("has_loss_scale") else ""
        return Section("scale", title, paragraph(f"Nothing scaled the loss of this run{why}."))
    groups = _groups(told)
    missed = [skip for a in attempts if a.rank_table for skip in skips(a.rank_table, a.start_step)]
    count = sum(skip.count for skip in missed)
    scales = np.concatenate([v for _, ranks in told for v in ranks.values()])
    finite = scales[np.isfinite(scales)]
    said = f"{units.many(count, 'optimizer step')} skipped because gradients were not finite"
    if len(finite):
        least, most = units.number(finite.min(), 8), units.number(finite.max(), 8)
        said += (
            f"; the scale was {least} throughout" if least == most else f"; the scale was between {least} and {most}"
        )
    same = len(groups) == 1
    said += "; all ranks had the same scale throughout." if same and _world(told) > 1 else "."
    parts: list[Any] = []
    if not same:
        parts.append(paragraph(badge("ranks differ", "bad"), " The ranks' loss scales were not equal: they did not "
                               "step together, and trained different models."))  # fmt: skip
    restarts = [float(a.start_step) for a in attempts[1:] if a.start_step is not None]
    picture = draw_loss_scale("scale-plot", said, groups, missed, restarts=restarts, floor=watch_of(run).floor)
    parts.append(figure(picture, said + " A mark stands where the count was read, at the end of its logging interval."))
    if missed:
        rows = [(f"{s.before + 1:,} to {s.step:,}", units.count(s.count)) for s in missed[:_MOST_ROWS]]
        more = f"The first {_MOST_ROWS} of {len(missed)} intervals" if len(missed) > _MOST_ROWS else "Skipped steps"
        parts.append(folded("Where steps were skipped", table(("steps", "skipped"), rows, more, numeric=(1,))))
    return Section("scale", title, join(*parts))


def ranks_section(run: Run) -> Section:
    """Step time of all ranks, with stragglers named."""
    title, history = "Step time and ranks", run.history
    lines = [step_time_line(a) for a in history.attempts]
    if not any(len(line.steps) for line in lines) and not any(a.rank_table for a in history.attempts):
        return Section("ranks", title, paragraph("No step time was recorded: the run was too short for one interval."))
    parts: list[Any] = []
    if any(len(line.steps) for line in lines):
        values = np.concatenate([line.values for line in lines])
        said = (
            f"An optimizer step took {units.duration(float(np.median(values)) / 1e3)} (median), the slowest interval "
            f"{units.duration(float(values.max()) / 1e3)} a step. Validation and checkpoints are not in it."
        )
        restarts = [float(a.start_step) for a in history.attempts[1:] if a.start_step is not None]
        curve = Curve("optimizer step, rank 0", lines, trend=True)
        parts.append(figure(draw_curves("time", "Step time", said, "ms a step", [curve], restarts=restarts, height=2.4,
                                        from_zero=True), said))  # fmt: skip
    summaries = summarize_ranks(history)
    slow = stragglers(summaries, watch_of(run))
    if len(summaries) > 1:
        parts += _rank_times(run, summaries, slow)
    if summaries:
        parts.append(_rank_table(summaries, slow))
    return Section("ranks", title, join(*parts))


def memory_section(run: Run) -> Section:
    """What the plan expected beside what was measured."""
    title, plan = "Memory", run.history.plan
    summaries = [s for s in summarize_ranks(run.history) if s.peak_memory is not None]
    memory = mapping(plan.get("memory"))
    planned = planned_parts(plan)
    end = next((a.memory for a in reversed(run.history.attempts) if a.memory is not None), None)
    if not summaries and not planned and end is None:
        return Section("memory", title, paragraph("No memory was planned or measured."))
    peaks = {s.rank: float(s.peak_memory or 0) for s in summaries}
    if end is not None:
        peaks = {rank: float(peak) for rank, peak in end.measured.items()}
    total = sum(planned.values())
    unit, size = units.size_unit(max([total, *peaks.values()]))
    limit = number(memory.get("limit_bytes"))
    highest = sorted(peaks, key=lambda rank: -peaks[rank])[:_MOST_BARS]
    bars = [(f"rank {rank}", peaks[rank] / size) for rank in sorted(highest)]
    caption = f"The highest peak was {units.size(max(peaks.values()))} ({rank_names([highest[0]])})" if peaks else ""
    if planned:
        told = f"{units.size(total)} ({memory.get('method', 'estimated')})"
        caption += f", {max(peaks.values()) / total:.0%} of the plan's {told}" if peaks else f"The plan said {told}"
    caption += "."
    if limit is not None:
        caption += f" A rank may use {units.size(limit)}."
    if len(peaks) > _MOST_BARS:
        caption += f" The {_MOST_BARS} highest of {len(peaks)} ranks."
    notes: list[Any] = []
    if end is not None:
        notes += _against_plan(end)
    elif plan.get("device_kind") == "cpu" and peaks:
        notes.append(paragraph("On a CPU what is measured is the whole process (Python, libraries, loaders), which the "
                               "plan of a rank's tensors does not count."))  # fmt: skip
    if not planned:
        notes.append(paragraph("The plan of this run has no estimate of its memory."))
    parts = [(_PARTS.get(name, name), amount / size) for name, amount in planned.items() if amount]
    drawn = draw_memory("memory-plot", caption, parts, bars, None if limit is None else limit / size, unit)
    return Section("memory", title, join(figure(drawn, caption), *notes))


def _against_plan(end: MemoryEnd) -> list[Any]:
    """A row for each rank, and what was measured."""
    rows = [
        (
            f"rank {rank}",
            units.size(end.planned),
            units.size(peak),
            f"{peak / end.planned:.0%}" if end.planned else "\u2013",
        )
        for rank, peak in list(end.measured.items())[:_MOST_ROWS]
    ]
    caption = f"Measured: {end.method}"
    return [table(("rank", "planned", "measured", "of the plan"), rows, caption, numeric=range(1, 4))]


def planned_parts(plan: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of a rank by part, of the strategy that was taken; empty without an estimate."""
    name = mapping(plan.get("strategy")).get("name")
    for entry in items(mapping(plan.get("memory")).get("assessments")):
        if mapping(entry).get("name") == name:
            told = mapping(mapping(entry).get("memory"))
            return {part: size for part in _PARTS if (size := number(told.get(part))) is not None}
    return {}


def watch_of(run: Run) -> WatchOptions:
    """When the run raised an alert; the defaults where its config does not say."""
    given, default = mapping(run.config.get("watch")), WatchOptions()

    def limit(name: str) -> float:
        told = number(given.get(name))
        return getattr(default, name) if told is None else told

    return WatchOptions(floor=limit("floor"), slow_factor=limit("slow_factor"), slow_share=limit("slow_share"))


def stragglers(summaries: Sequence[RankSummary], watch: WatchOptions) -> list[int]:
    """Ranks that cost the others time over the whole run, by the rule of the alerts (`launcher.monitoring.health`)."""
    slow: list[int] = []
    for summary in summaries:
        others = summary.own_seconds / summary.own_factor if summary.own_factor else math.nan
        more = summary.own_seconds - others
        if summary.own_factor >= watch.slow_factor and more >= watch.slow_share * summary.step_seconds:
            slow.append(summary.rank)
    return slow


def _rank_times(run: Run, summaries: Sequence[RankSummary], slow: Sequence[int]) -> list[Any]:
    own = [(a.rank_table.steps, a.rank_table.column("own_seconds")) for a in run.history.attempts if a.rank_table]
    restarts = [float(a.start_step) for a in run.history.attempts[1:] if a.start_step is not None]
    by_need = sorted(summaries, key=lambda s: -s.own_seconds if math.isfinite(s.own_seconds) else 0.0)
    first = by_need[0]
    said = "Data and forward pass are a rank's own; in the backward pass all wait for the slowest. "
    said += f"Rank {first.rank} needed most"
    if math.isfinite(first.own_factor):
        said += f", {first.own_factor:.3g} times the others' median"
    said += f"; it was the slowest in {first.share_slowest:.0%} of the intervals."
    head: list[Any] = [element("h3", "Ranks against each other")]
    if slow:
        named = rank_names(slow)
        head.append(paragraph(badge("straggler", "bad"), f" {named[0].upper()}{named[1:]} kept the others waiting."))
    many = len(summaries) > _MOST_BARS
    shown = sorted((by_need[:_MOST_BARS] if many else summaries), key=lambda s: s.rank)
    data = np.nan_to_num(np.array([s.data_seconds for s in shown])) * 1e3
    forward = np.maximum(np.nan_to_num(np.array([s.own_seconds for s in shown])) * 1e3 - data, 0)
    rest = np.maximum(np.nan_to_num(np.array([s.step_seconds for s in shown])) * 1e3 - data - forward, 0)
    bars = f"Where the time of a step goes{f', the {_MOST_BARS} slowest of {len(summaries)} ranks' if many else ''}."
    scaled = [(steps, {rank: values * 1e3 for rank, values in ranks.items()}) for steps, ranks in own]
    times = draw_rank_times("own", said, scaled, slow or [first.rank], restarts)
    return [*head, figure(times, said),
            figure(draw_rank_bars("bars", bars, [s.rank for s in shown], data, forward, rest), bars)]  # fmt: skip


def _rank_table(summaries: Sequence[RankSummary], slow: Sequence[int]) -> Any:
    by_need = sorted(summaries, key=lambda s: (s.rank not in slow, s.rank))[:_MOST_ROWS]
    rows = [
        (join(f"rank {s.rank}", *([" ", badge("straggler", "bad")] if s.rank in slow else [])),
         units.milliseconds(s.step_seconds), units.milliseconds(s.data_seconds), units.milliseconds(s.own_seconds),
         "\u2013" if math.isnan(s.own_factor) else f"{s.own_factor:.2f}", f"{s.share_slowest:.0%}",
         units.count(s.skipped_steps), units.size(s.peak_memory))
        for s in by_need
    ]  # fmt: skip
    head = ("rank", "step (ms)", "data (ms)", "own (ms)", "\u00d7 others", "slowest", "skipped", "peak memory")
    caption = "Medians over all intervals; own: data and forward pass; slowest: share of the intervals"
    if len(summaries) > len(rows):
        caption += f"; {len(rows)} of {len(summaries)} ranks"
    marked = [i for i, s in enumerate(by_need) if s.rank in slow]
    return table(head, rows, caption, numeric=range(1, 8), marked=marked)


def _groups(told: Sequence[tuple[Any, Mapping[int, Any]]]) -> list[tuple[str, list[Line]]]:
    """Ranks that had the same scale in every attempt, with their lines."""
    whole: dict[int, Any] = {}
    for rank in sorted({rank for _, ranks in told for rank in ranks}):
        whole[rank] = np.concatenate([ranks.get(rank, np.full(len(steps), np.nan)) for steps, ranks in told])
    found: list[tuple[str, list[Line]]] = []
    for ranks, _ in alike(whole):
        lines = [Line(steps, values[ranks[0]]) for steps, values in told if ranks[0] in values]
        found.append((rank_names(ranks), lines))
    return found


def _world(told: Sequence[tuple[Any, Mapping[int, Any]]]) -> int:
    return max((len(ranks) for _, ranks in told), default=0)
