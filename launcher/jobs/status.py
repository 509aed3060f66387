"""The state of a run, from its events and from the back end of its newest job."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.errors import QueueError
from launcher.core.event_text import describe_event
from launcher.core.events import FILE_NAME, read_events
from launcher.jobs.backends.base import JobStatus, Record
from launcher.jobs.backends.local import read_directory_status
from launcher.jobs.backends.registry import find_backend
from launcher.runs.job_output import read_job_output
from launcher.runs.submission_record import read_records
from slurm.attempts import read_attempts


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run.

    Attributes:
        state: queued, running, requeued, done, stopped, failed, cancelled, or ended (the result is not known).
        detail: why it waits, where it runs, or what went wrong.
        job: 'slurm 123', 'local 4711', or None for a run that was not submitted.
        step: optimizer steps done.
        checkpoint_step: optimizer step of the newest checkpoint.
        updated: time of the last event, seconds since 1970.
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
        """Whether the run needs a new submission to continue."""
        return self.state not in ("queued", "running", "requeued")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class RunProgress:
    """A run's progress by its events: fields of `RunStatus`, and how the last attempt ended (None: not reported)."""

    attempts: int = 0
    step: int = 0
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint_step: int = 0
    updated: float | None = None
    ending: str | None = None
    detail: str = ""


def read_run_status(run: Path, job: JobStatus | None = None) -> RunStatus:
    """The state of the run in a directory; `job` is the status of its newest job, if it is known already."""
    progress = summarize_events(run / FILE_NAME)
    records = read_records(run)
    record = records[-1] if records else None
    if job is None:
        job = read_directory_status(run) if record is None else read_job_statuses([record])[0]
    starts = sum(len(read_attempts(Path(each["folder"]))) for each in records)
    ending = (progress.ending or "ended", progress.detail)
    if job.state == "unknown":
        job = JobStatus("running" if progress.ending is None else "ended", job.detail)
    if record is not None and record.get("submitted", 0) > (progress.updated or 0):
        # The events are those of an earlier submission.
        output = read_job_output(record)
        ending = ("ended", "") if output is None else ("failed", f"{output.reason} ({output.file})")
    state, detail = _combine(job, *ending, starts)
    return RunStatus(
        name=run.name,
        state=state,
        detail=detail,
        job=None if record is None else _describe_job(record),
        attempts=max(progress.attempts, starts),
        step=progress.step,
        metrics=progress.metrics,
        checkpoint_step=progress.checkpoint_step,
        updated=progress.updated,
    )


def read_run_statuses(runs: Sequence[Path]) -> list[RunStatus]:
    """The state of several runs; each back end is asked once."""
    newest = {run: records[-1] for run in runs if (records := read_records(run))}
    jobs = dict(zip(newest, read_job_statuses(list(newest.values())), strict=True))
    return [read_run_status(run, jobs.get(run)) for run in runs]


def read_job_statuses(records: Sequence[Record]) -> list[JobStatus]:
    """The status of each job, by its back end."""
    found: dict[int, JobStatus] = {}
    for cluster in dict.fromkeys(record.get("cluster") for record in records):
        those = [number for number, record in enumerate(records) if record.get("cluster") == cluster]
        try:
            statuses = find_backend(cluster).statuses([records[number] for number in those])
        except QueueError as error:
            statuses = [JobStatus("unknown", str(error))] * len(those)
        found.update(zip(those, statuses, strict=True))
    return [found[number] for number in range(len(records))]


def _describe_job(record: Record) -> str:
    try:
        return find_backend(record.get("cluster")).describe(record)
    except QueueError:
        return str(record.get("cluster"))


def _combine(job: JobStatus, ending: str, detail: str, starts: int) -> tuple[str, str]:
    """The run's state and its detail, from the job and from the ending that the events report. Pure."""
    if job.state == "ended":
        return ending, "; ".join(filter(None, (detail, job.detail)))
    if job.state == "done":
        return "done", detail if ending != "done" else ""
    if job.state in ("failed", "cancelled"):
        return job.state, ": ".join(filter(None, (job.detail, detail)))
    return "requeued" if job.state == "queued" and starts else job.state, job.detail


def summarize_events(events: Path) -> RunProgress:
    """The progress of a run by its event file."""
    found = read_events(events) if events.exists() else ()
    return functools.reduce(_add_event, found, RunProgress())


def _add_event(progress: RunProgress, event: Mapping[str, Any]) -> RunProgress:
    kind, change = event["kind"], {"updated": event.get("time", progress.updated)}
    if kind == "run_started":
        change.update(attempts=progress.attempts + 1, ending=None, detail="")
    if kind in ("step", "validation", "finished", "interrupted", "training_started") and isinstance(
        event.get("step"), int
    ):
        change["step"] = event["step"]
    if kind in ("step", "validation", "finished") and isinstance(event.get("metrics"), dict):
        change["metrics"] = {**progress.metrics, **event["metrics"]}
    if kind == "checkpoint":
        change.update(checkpoint_step=event.get("step", 0), step=max(progress.step, event.get("step", 0)))
    if kind == "finished":
        change.update(ending="done", detail="")
    elif kind == "interrupted":
        # A plain script reports no steps.
        step = "" if event.get("step") is None else f" after step {event['step']}"
        change.update(ending="stopped", detail=f"by signal {event.get('signal')}{step}")
    elif kind == "failed":
        change.update(ending="failed", detail=str(event.get("error", "")))
    elif kind == "out_of_memory":
        change.update(ending="failed", detail=f"out of memory with {event.get('strategy')}")
    elif kind == "nodes_missing":
        change.update(ending="failed", detail=describe_event(event, kind))
    return dataclasses.replace(progress, **change)
