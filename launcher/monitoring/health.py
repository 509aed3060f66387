"""Evaluates the samples of all ranks: metrics to log, and alerts. Pure functions."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.monitoring.samples import RankSample
from launcher.monitoring.skipped_steps import SkipCount, find_skipped_steps, recent_counts

AlertKind = Literal[
    "scale_not_finite",
    "scale_underflow",
    "scale_at_floor",
    "steps_skipped",
    "ranks_diverged",
    "loss_not_finite",
    "slow_rank",
    "buffers_not_finite",
]
# Alerts about a loss scale that has reached its end.
_COLLAPSED: tuple[AlertKind, ...] = ("scale_not_finite", "scale_underflow", "scale_at_floor")
# In the names of losses that are not the training's own; the best one so far may start as infinite.
_OTHER_LOSSES = frozenset(("val", "valid", "validation", "eval", "test", "best", "min", "max", "lowest"))
LOSS_NOT_FINITE: AlertKind = "loss_not_finite"
LOSS_TITLE = "the loss is not finite"
LOSS_ADVICE = "check the batch, the learning rate and the precision"


@dataclass(frozen=True, slots=True)
class Limits:
    """Thresholds of the alerts.

    Attributes:
        floor: a loss scale at or below it has collapsed; below it, a few skipped steps raise an alert.
        floor_steps: steps in a row at the floor that raise an alert.
        slow_factor: a rank is slow if it needs this many times the others' own time,
        slow_share: and if the other ranks wait for it during this share of the step time,
        slow_steps: for this many steps, over at least two samples.
    """

    floor: float = 1.0
    floor_steps: int = 100
    slow_factor: float = 1.5
    slow_share: float = 0.1
    slow_steps: int = 50


@dataclass(frozen=True, slots=True)
class Alert:
    """A problem of the training that needs attention.

    Attributes:
        kind: the rule that was broken.
        text: what was measured, and what to do.
    """

    kind: AlertKind
    title: str
    text: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """State of the ranks at one sample; the next sample is compared with it.

    Attributes:
        floor_steps: for each rank, steps in a row at the floor.
        skipped_steps: steps skipped since the training began; None if no rank counts them.
        skip_counts: the same at this sample and at earlier ones, oldest first.
        slow_rank: the rank that was too slow since the sample before; None if no rank was.
        slow_since: steps done when this rank began to be too slow.
    """

    step: int
    metrics: Mapping[str, float | bool] = field(default_factory=dict[str, float | bool])
    alerts: tuple[Alert, ...] = ()
    floor_steps: Mapping[int, int] = field(default_factory=dict[int, int])
    skipped_steps: int | None = None
    skip_counts: tuple[SkipCount, ...] = ()
    slow_rank: int | None = None
    slow_since: int = 0


def judge(samples: Sequence[RankSample], step: int, before: Health, limits: Limits) -> Health:
    """Compare the ranks with each other, with the limits and with the sample before.

    `samples` has one per rank, at least one. `before` is the result for the sample before, or `Health(step)` of the
    first step at the beginning.
    """
    ranks = sorted(samples, key=lambda s: s.rank)
    steps = max(step - before.step, 1)
    floor_steps = {s.rank: _floor_steps(s, before.floor_steps.get(s.rank, 0), steps, limits.floor) for s in ranks}
    skipped = max((s.skipped_steps for s in ranks if s.skipped_steps is not None), default=None)
    metrics: dict[str, float | bool] = {}
    alerts: list[Alert] = []
    counts = before.skip_counts
    if any(s.scale is not None for s in ranks):
        metrics.update(_scale_metrics(ranks, floor_steps))
        alerts += _scale_alerts(ranks, floor_steps, limits)
    if skipped is not None:
        metrics["amp/skipped_steps"] = skipped
        # After a resume the count includes steps skipped before.
        known = before.skipped_steps if before.skipped_steps is not None else 0 if before.step == 0 else skipped
        metrics["amp/skip_rate"] = max(skipped - known, 0) / steps
        counts = (*(before.skip_counts or (SkipCount(before.step, known),)), SkipCount(step, skipped))
        alerts += _skip_alert(ranks, counts, limits, alerts)
    counts = recent_counts(counts)
    metrics.update(_time_metrics(ranks))
    alerts += _loss_alert(ranks)
    slow = find_slow_rank(ranks, limits)
    if slow is None:
        return Health(step, metrics, tuple(alerts), floor_steps, skipped, counts)
    # A single slow sample may be a warm-up, or another job on the node.
    again = before.slow_rank == slow.ranks[0]
    since = before.slow_since if again else before.step
    if again and step - since >= limits.slow_steps:
        alerts.append(slow)
    return Health(step, metrics, tuple(alerts), floor_steps, skipped, counts, slow.ranks[0], since)


def _floor_steps(sample: RankSample, before: int, steps: int, floor: float) -> int:
    """The scaler's own count; without one, the scale is assumed to be at the floor since the sample before."""
    if sample.floor_steps is not None:
        return sample.floor_steps
    return before + steps if sample.scale is not None and sample.scale <= floor else 0


def _scale_metrics(ranks: Sequence[RankSample], floor_steps: Mapping[int, int]) -> dict[str, float | bool]:
    scales = [s.scale for s in ranks if s.scale is not None]
    metrics: dict[str, float | bool] = {
        # Comparisons with NaN are false; it must be visible in both.
        "amp/loss_scale_min": math.nan if any(map(math.isnan, scales)) else min(scales),
        "amp/loss_scale_max": math.nan if any(map(math.isnan, scales)) else max(scales),
        "amp/ranks_diverged": int(bool(_diverged(ranks))),
        "amp/overflow": any(not math.isfinite(s) for s in scales),
        "amp/underflow": any(s == 0 for s in scales),
        "amp/floor_steps": max(floor_steps.values()),
    }
    if ranks[0].scale is not None:
        metrics["amp/loss_scale"] = ranks[0].scale
    trackers = [s.growth_tracker for s in ranks if s.growth_tracker is not None]
    if trackers:
        metrics["amp/growth_tracker"] = min(trackers)
    return metrics


def _time_metrics(ranks: Sequence[RankSample]) -> dict[str, float | bool]:
    metrics: dict[str, float | bool] = {
        "perf/step_seconds": max(s.step_seconds for s in ranks),
        "perf/data_seconds": max(s.data_seconds for s in ranks),
        "perf/peak_memory_bytes": max(s.peak_memory for s in ranks),
    }
    seconds = metrics["perf/step_seconds"]
    throughputs = {
        "perf/samples_per_second": [s.samples for s in ranks],
        "perf/tokens_per_second": [s.tokens for s in ranks],
    }
    for name, counts in throughputs.items():
        known = [count for count in counts if count is not None]
        if seconds > 0 and len(known) == len(ranks):
            metrics[name] = sum(known) / seconds
    if len(ranks) > 1:
        slowest, factor, _ = _slowest(ranks)
        metrics["perf/slowest_rank"] = slowest.rank
        metrics["perf/slowest_factor"] = factor
    return metrics


def _slowest(ranks: Sequence[RankSample]) -> tuple[RankSample, float, float]:
    """The rank with the longest own time: it, how many times the others' median, and how many seconds longer."""
    slowest = max(ranks, key=lambda s: s.own_seconds)
    median = statistics.median(s.own_seconds for s in ranks if s is not slowest)
    return slowest, slowest.own_seconds / median if median > 0 else 1.0, slowest.own_seconds - median


def _diverged(ranks: Sequence[RankSample]) -> tuple[int, ...]:
    """The ranks whose scale is not the most common one. In a tie rank zero's counts as the most common."""
    known = [s for s in ranks if not s.scale_unknown]
    keys = {s.rank: "NaN" if s.scale is not None and math.isnan(s.scale) else s.scale for s in known}
    if len(set(keys.values())) <= 1:
        return ()
    # `most_common` keeps the order of insertion, and rank zero is first.
    common = Counter(keys.values()).most_common(1)[0][0]
    return tuple(rank for rank, key in keys.items() if key != common)


def _scale_alerts(ranks: Sequence[RankSample], floor_steps: Mapping[int, int], limits: Limits) -> list[Alert]:
    alerts: list[Alert] = []
    broken = tuple(s.rank for s in ranks if s.scale is not None and not math.isfinite(s.scale))
    if broken:
        alerts.append(Alert(
            "scale_not_finite", "the loss scale is not finite",
            f"{format_ranks(broken)}: no gradient is finite, and the model no longer learns; resume from an earlier "
            "checkpoint, with bf16-mixed if the device supports it, or with a lower learning rate", broken,
        ))  # fmt: skip
    zero = tuple(s.rank for s in ranks if s.scale == 0)
    if zero:
        alerts.append(Alert(
            "scale_underflow", "the loss scale is 0",
            f"{format_ranks(zero)}: every gradient overflowed until the scale reached 0; check for an infinite loss, "
            "or train in bf16-mixed", zero,
        ))  # fmt: skip
    low = tuple(r for r, n in floor_steps.items() if n >= limits.floor_steps and r not in zero)
    if low:
        alerts.append(Alert(
            "scale_at_floor", "the loss scale stays at its floor",
            f"{format_ranks(low)}: at or below {limits.floor:g} for {max(floor_steps[r] for r in low)} steps in a row; "
            "gradients overflow at any scale: check for an infinite loss, lower the learning rate, clip the gradients, "
            "or train in bf16-mixed", low,
        ))  # fmt: skip
    diverged = _diverged(ranks)
    if diverged:
        scales = ", ".join(f"rank {s.rank}: {s.scale}" for s in ranks if s.rank in diverged[:8])
        alerts.append(Alert(
            "ranks_diverged", "the ranks' loss scales differ",
            f"rank 0 has {ranks[0].scale}; {scales}: the ranks no longer skip the same steps, and their weights "
            "differ; check that every rank reduces the same gradients", diverged,
        ))  # fmt: skip
    return alerts


def _skip_alert(
    ranks: Sequence[RankSample], counts: Sequence[SkipCount], limits: Limits, raised: Iterable[Alert]
) -> list[Alert]:
    scales = {s.rank: s.scale for s in ranks if s.scale is not None}
    found = find_skipped_steps(counts, min(scales.values(), default=None), limits.floor)
    # Each of these alerts explains the same overflows better.
    if found is None or any(alert.kind in _COLLAPSED for alert in raised):
        return []
    share = f"{found.skipped} of the last {found.steps} steps were skipped"
    if found.is_below_floor:
        affected = tuple(rank for rank, scale in scales.items() if scale < limits.floor)
        text = (
            f"{share}, and the loss scale of {format_ranks(affected)} fell to {min(scales.values()):.3g}, below "
            f"{limits.floor:g}: gradients overflow even if the loss is not scaled up; lower the learning rate, clip "
            "the gradients, check for an infinite loss, or train in bf16-mixed"
        )
    else:
        affected = tuple(s.rank for s in ranks if s.skipped_steps == counts[-1].skipped)
        text = (
            f"{share}, and these batches are lost; a healthy training skips about 1 step in 2000: check the data for "
            "extreme values, lower the learning rate, use the scaler's default growth interval, or train in bf16-mixed"
        )
    return [Alert("steps_skipped", "many optimizer steps are skipped", text, affected)]


def _loss_alert(ranks: Sequence[RankSample]) -> list[Alert]:
    broken = tuple(s.rank for s in ranks if s.loss_not_finite)
    if not broken:
        return []
    return [Alert(LOSS_NOT_FINITE, LOSS_TITLE, f"{format_ranks(broken)}: {LOSS_ADVICE}", broken)]


def find_broken_losses(metrics: Mapping[str, float]) -> list[str]:
    """Names of logged training losses that are infinite or NaN. The name decides: 'train_loss', 'g/loss'."""
    return [name for name, value in metrics.items() if not math.isfinite(value) and _is_training_loss(name)]


def _is_training_loss(name: str) -> bool:
    parts = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()))
    return "loss" in parts and not parts & _OTHER_LOSSES


def find_slow_rank(ranks: Sequence[RankSample], limits: Limits) -> Alert | None:
    """Return an alert for the slowest rank if the others wait for it longer than the limits allow, else None."""
    if len(ranks) < 2:
        return None
    slowest, factor, more = _slowest(ranks)
    step = max(s.step_seconds for s in ranks)
    if factor < limits.slow_factor or more < limits.slow_share * step:
        return None
    text = (
        f"rank {slowest.rank} needs {slowest.own_seconds * 1e3:.3g} ms a step for data and forward pass, {factor:.2g} "
        f"times the others; all ranks wait for it during {more / step:.0%} of each step"
    )
    return Alert("slow_rank", f"rank {slowest.rank} is slow", text, (slowest.rank,))


def format_ranks(ranks: Iterable[int], limit: int = 8) -> str:
    """As in 'ranks 0, 1 and 3 more'."""
    listed = sorted(ranks)
    named = f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed[:limit]))}"
    return named if len(listed) <= limit else f"{named} and {len(listed) - limit} more"
