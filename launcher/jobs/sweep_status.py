"""The state and the results of a sweep's members."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.core.events import FILE_NAME, read_events
from launcher.jobs.backends.registry import find_backend
from launcher.jobs.status import RunStatus, read_run_statuses
from launcher.runs.submission_record import read_records
from launcher.runs.sweep_record import read_arrays, read_members

_DEFAULT_MONITOR = "val_loss"


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member of a sweep.

    Attributes:
        status: None before queueing.
        monitor: name of the metric that `last` and `best` are values of.
        is_highest_best: whether a higher value is better.
    """

    index: int
    name: str
    settings: Mapping[str, Any]
    status: RunStatus | None
    monitor: str
    last: float | None = None
    best: float | None = None
    is_highest_best: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether the member needs a new submission to continue."""
        return self.status is None or self.status.has_ended

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        run = None if self.status is None else self.status.to_dict()
        last = self.last if self.last is not None and math.isfinite(self.last) else None
        return {"index": self.index, "name": self.name, "settings": dict(self.settings), "run": run,
                "monitor": self.monitor, "mode": "max" if self.is_highest_best else "min", "last": last,
                "best": self.best}  # fmt: skip


def read_sweep_status(sweep: Path) -> list[MemberStatus]:
    """Every member, by index."""
    members = read_members(sweep)
    runs = [sweep.parent / member["name"] for member in members]
    statuses = {status.name: status for status in read_run_statuses([run for run in runs if run.is_dir()])}
    found: list[MemberStatus] = []
    for member, run in zip(members, runs, strict=True):
        monitor, is_highest_best = _monitor(run)
        values = _values(run, monitor)
        best = (max if is_highest_best else min)((value for value in values if math.isfinite(value)), default=None)
        last = values[-1] if values else None
        found.append(MemberStatus(member["index"], member["name"], member["overrides"], statuses.get(run.name),
                                  monitor, last, best, is_highest_best))  # fmt: skip
    return found


def sort_by_monitor(members: Sequence[MemberStatus]) -> list[MemberStatus]:
    """The best first; members without a value last, by index."""

    def key(member: MemberStatus) -> tuple[bool, float, int]:
        value = 0.0 if member.best is None else -member.best if member.is_highest_best else member.best
        return member.best is None, value, member.index

    return sorted(members, key=key)


def cancel_sweep(sweep: Path) -> list[str]:
    """Stop all jobs of a sweep; returns lines for the user.

    Raises:
        QueueError: a job cannot be stopped.
    """
    lines: list[str] = []
    for array in read_arrays(sweep):
        chosen = [member for member in read_members(sweep) if member["index"] in array.get("indices", ())]
        records = [records[-1] for member in chosen if (records := read_records(sweep.parent / member["name"]))]
        lines += find_backend(array.get("cluster")).cancel_sweep(array, records)
    return lines


def _monitor(run: Path) -> tuple[str, bool]:
    """The metric that the member's config monitors, and whether its highest value is the best."""
    files = sorted(run.glob("submissions/*/config.yaml"), key=lambda file: file.stat().st_mtime)
    files = files or [run / "config.yaml"]
    try:
        checkpoint = yaml.safe_load(files[-1].read_text(encoding="utf-8"))["checkpoint"]
        return checkpoint["monitor"] or _DEFAULT_MONITOR, checkpoint.get("mode") == "max"
    except (IndexError, OSError, yaml.YAMLError, KeyError, TypeError):
        return _DEFAULT_MONITOR, False


def _values(run: Path, metric: str) -> list[float]:
    """Every value of a metric, in the order of the events."""
    events = run / FILE_NAME
    if not events.exists():
        return []
    kinds = ("step", "epoch", "validation", "finished")
    found = (event.get("metrics") for event in read_events(events) if event.get("kind") in kinds)
    values = (metrics.get(metric) for metrics in found if isinstance(metrics, dict))
    # Values that are not finite are texts in the events.
    return [float(value) for value in values if isinstance(value, int | float) or value in ("nan", "inf", "-inf")]
