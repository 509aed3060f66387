"""Reads a sweep: the status of its members, and their runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.secrets import redact
from launcher.jobs.status import RunStatus
from launcher.jobs.sweep_status import MemberStatus, read_sweep_status, sort_by_monitor
from launcher.report.overview import to_values
from launcher.report.source import Run, is_run, read_run
from launcher.report.units import format_plural

NOT_QUEUED = RunStatus("", "not queued", advice="submit the sweep again")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep: its members, the best first, and their runs by name, as far as they have started."""

    path: Path
    members: Sequence[MemberStatus]
    runs: Mapping[str, Run]

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name

    @property
    def monitor(self) -> str:
        """The metric that the table is sorted by."""
        return self.members[0].monitor

    @property
    def best(self) -> MemberStatus | None:
        """The member with the best value; None if no member has one."""
        return None if self.members[0].best is None else self.members[0]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's folder and the runs of its members.

    Raises:
        ReportError: the events of a member cannot be read.
    """
    members = sort_by_monitor(read_sweep_status(path))
    folders = {member.name: path.parent / member.name for member in members}
    return Sweep(path.absolute(), members, {n: read_run(f.absolute()) for n, f in folders.items() if is_run(f)})


def summarize_states(sweep: Sweep) -> str:
    """As '5 members: 4 done, 1 failed'."""
    states = Counter((member.status or NOT_QUEUED).state for member in sweep.members)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{format_plural(len(sweep.members), 'member')}: {counts}"


def to_sweep_values(sweep: Sweep) -> dict[str, Any]:
    """The sweep as JSON values: its members, the best first, each with the values of its run (null if not started)."""
    members: list[dict[str, Any]] = []
    for member in sweep.members:
        status, run = member.status or NOT_QUEUED, sweep.runs.get(member.name)
        last = member.last if member.last is not None and math.isfinite(member.last) else None
        members.append({
            "index": member.index, "name": member.name, "settings": dict(redact(member.settings)),
            "state": status.state, "detail": status.detail, "best": member.best, "last": last,
            "run": None if run is None else to_values(run),
        })  # fmt: skip
    mode = "max" if sweep.members[0].is_highest_best else "min"
    best = None if sweep.best is None else sweep.best.name
    return {"name": sweep.name, "path": str(sweep.path), "monitor": sweep.monitor, "mode": mode, "best": best,
            "members": members}  # fmt: skip
