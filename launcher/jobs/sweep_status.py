"""How the members of a sweep stand, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.core.events import FILE_NAME, read_events
from launcher.jobs.status import RunStatus, run_status
from launcher.jobs.sweep import describe
from launcher.runs.sweep_record import read_members
from slurm.queue import JobState, array_states, job_state

_DEFAULT_MONITOR = "val_loss"


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member of a sweep.

    Attributes:
        index: its number.
        settings: what sets it apart.
        status: of its run; None if it was never queued.
        monitor: the metric that its config watches.
        last, best: of that metric; None without one.
    """

    index: int
    settings: Mapping[str, Any]
    status: RunStatus | None
    monitor: str
    last: float | None = None
    best: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.status is None or self.status.has_ended

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        run = None if self.status is None else self.status.to_dict()
        return {"index": self.index, "settings": dict(self.settings), "run": run, "monitor": self.monitor,
                "last": self.last, "best": self.best}  # fmt: skip


def sweep_status(sweep: Path) -> list[MemberStatus]:
    """Every member, in the order of their numbers."""
    ask = _asker()
    found: list[MemberStatus] = []
    for member in read_members(sweep):
        run = sweep.parent / member["name"]
        status = run_status(run, ask) if run.is_dir() else None
        monitor, highest = _watched(run)
        values = _values(run, monitor)
        best = (max if highest else min)(values) if values else None
        last = values[-1] if values else None
        found.append(MemberStatus(member["index"], member["overrides"], status, monitor, last, best))
    return found


def print_sweep(found: Sequence[MemberStatus], *, clear: bool = False) -> None:
    """The table of results."""
    from rich.markup import escape
    from rich.table import Table

    from launcher.core.terminal import make_console

    console = make_console()
    if clear and console.is_terminal:
        console.clear()
    monitors = ", ".join(dict.fromkeys(member.monitor for member in found))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "settings", "state", "attempts", "step", monitors, "best", ""):
        table.add_column(column, overflow="fold")
    for member in found:
        status = member.status or RunStatus("", "not queued")
        row = (member.index, describe(member.settings), status.state, status.attempts, status.step, _short(member.last),
               _short(member.best), status.detail)  # fmt: skip
        # Text, not markup: what a job or a model says may look like any.
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def _asker() -> Callable[[str], JobState]:
    """How a member's job stands; each array is asked for once."""
    known: dict[str, dict[int, JobState]] = {}

    def ask(job_id: str) -> JobState:
        array, _, index = job_id.partition("_")
        if not index:
            return job_state(job_id)
        if array not in known:
            known[array] = array_states(array)
        return known[array].get(int(index), JobState("UNKNOWN"))

    return ask


def _watched(run: Path) -> tuple[str, bool]:
    """The metric that the member's config watches, and whether the highest is the best."""
    files = sorted(run.glob("submissions/*/config.yaml"), key=lambda file: file.stat().st_mtime)
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
    told = (event.get("metrics") for event in read_events(events) if event.get("kind") in ("validation", "finished"))
    values = (metrics.get(metric) for metrics in told if isinstance(metrics, dict))
    return [float(value) for value in values if isinstance(value, int | float)]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
