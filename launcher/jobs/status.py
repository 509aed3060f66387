"""How a run stands, from what it left in its directory and what its queue says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.event_text import describe_event
from launcher.core.events import FILE_NAME, read_events
from launcher.process.background import is_running
from launcher.runs.job_output import read_job_output
from launcher.runs.lock import read_owner
from launcher.runs.submission_record import read_records
from launcher.runs.sweep_record import read_array_record
from slurm.attempts import read_attempts
from slurm.queue import JobState, QueueCommandError, job_state


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run.

    Attributes:
        name: its name.
        state: queued, running, requeued, done, stopped, failed, cancelled, or ended (no word of how).
        detail: why it waits, where it runs, or what went wrong.
        job: 'slurm 123', 'local 4711', or None for a run that was not submitted.
        attempts: how often it began.
        step: optimizer steps done, as far as the events say.
        steps: steps that it will have, None if not known.
        metrics: the last ones.
        checkpoint_step: step of the newest checkpoint.
        updated: time of the last event, seconds since 1970; None without one.
    """

    name: str
    state: str
    detail: str = ""
    job: str | None = None
    attempts: int = 0
    step: int = 0
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint_step: int = 0
    updated: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state not in ("queued", "running", "requeued")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What a run's events say of it."""

    attempts: int = 0
    step: int = 0
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint_step: int = 0
    updated: float | None = None
    ending: str | None = None
    detail: str = ""


def run_status(run: Path, ask: Callable[[str], JobState] = job_state) -> RunStatus:
    """Look at one run.

    Args:
        run: its directory.
        ask: how a job of SLURM's stands.
    """
    told = summarize_events(run / FILE_NAME)
    records = read_records(run)
    starts = sum(len(read_attempts(Path(record["folder"]))) for record in records)
    known = {"name": run.name, "attempts": max(told.attempts, starts), "step": told.step, "metrics": told.metrics,
             "checkpoint_step": told.checkpoint_step, "updated": told.updated}  # fmt: skip
    ending = (told.ending or "ended", told.detail)
    record = records[-1] if records else None
    if record is not None and record.get("submitted", 0) > (told.updated or 0):
        # What the events say is an earlier submission's.
        said = read_job_output(run, record)
        ending = ("ended", "") if said is None else ("failed", f"{said.reason} ({said.file})")
    if record is None or record.get("cluster") == "local":
        if record is not None and record.get("waits_in"):
            return _waiting(Path(record["waits_in"]), known)
        job = None if record is None else f"local {record.get('pid')}"
        _, lock = read_owner(run)
        # Where only the run's host could say, the events do.
        held = lock == "running" or (lock == "unknown" and told.ending is None)
        if held or (record is not None and _local_runs(record)):
            return RunStatus(state="running", job=job, **known)
        return RunStatus(state=ending[0], detail=ending[1], job=job, **known)
    job = f"slurm {record.get('job_id')}"
    try:
        asked = ask(str(record.get("job_id")))
    except QueueCommandError as error:
        return RunStatus(state=ending[0], detail=f"SLURM does not say: {error}", job=job, **known)
    state, detail = _in_words(asked, *ending, starts)
    return RunStatus(state=state, detail=detail, job=job, **known)


def _waiting(array: Path, known: Mapping[str, Any]) -> RunStatus:
    """A member of a sweep that has not begun."""
    job = f"sweep {array.parent.parent.name}"
    if _local_runs(read_array_record(array)):
        return RunStatus(state="queued", detail="waits for its turn", job=job, **known)
    return RunStatus(state="ended", detail="its sweep ended before it began", job=job, **known)


def _in_words(asked: JobState, ending: str, detail: str, starts: int) -> tuple[str, str]:
    """SLURM's state and the events' in one word, and what else there is to say. Pure."""
    if asked.state == "UNKNOWN":
        return ending, detail or "SLURM has forgotten the job"
    if not asked.has_ended:
        if asked.state in ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED"):
            return "running", asked.reason
        return ("requeued" if starts else "queued"), asked.reason
    if asked.state == "COMPLETED":
        return "done", detail if ending != "done" else ""
    code = f", exit code {asked.exit_code}" if asked.exit_code else ""
    said = f"{asked.state}{code}" + (f": {detail}" if detail else "")
    return ("cancelled" if asked.state == "CANCELLED" else "failed"), said


def summarize_events(events: Path) -> RunProgress:
    """What the events of a run say, in their order."""
    told = RunProgress()
    if not events.exists():
        return told
    for event in read_events(events):
        told = _after(told, event)
    return told


def _after(told: RunProgress, event: Mapping[str, Any]) -> RunProgress:
    kind, change = event["kind"], {"updated": event.get("time", told.updated)}
    if kind == "run_started":
        change.update(attempts=told.attempts + 1, ending=None, detail="")
    if kind in ("step", "validation", "finished", "interrupted", "training_started") and isinstance(
        event.get("step"), int
    ):
        change["step"] = event["step"]
    if kind in ("step", "validation", "finished") and isinstance(event.get("metrics"), dict):
        change["metrics"] = {**told.metrics, **event["metrics"]}
    if kind == "checkpoint":
        change.update(checkpoint_step=event.get("step", 0), step=max(told.step, event.get("step", 0)))
    if kind == "finished":
        change.update(ending="done", detail="")
    elif kind == "interrupted":
        change.update(ending="stopped", detail=f"by signal {event.get('signal')} after step {event.get('step')}")
    elif kind == "failed":
        change.update(ending="failed", detail=str(event.get("error", "")))
    elif kind == "out_of_memory":
        change.update(ending="failed", detail=f"out of memory with {event.get('strategy')}")
    elif kind == "nodes_missing":
        change.update(ending="failed", detail=describe_event(event, kind))
    return dataclasses.replace(told, **change)


def _local_runs(record: Mapping[str, Any]) -> bool:
    return record.get("host") == os.uname().nodename and is_running(record.get("pid", 0), record.get("started"))
