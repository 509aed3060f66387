"""The state of a run, from its events and from the back end of its newest job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.errors import QueueError
from launcher.core.event_text import as_text, remove_end
from launcher.core.events import FILE_NAME, read_events
from launcher.jobs.backends.base import JobStatus, Record
from launcher.jobs.backends.local import read_directory_status
from launcher.jobs.backends.registry import find_backend
from launcher.jobs.ending import Ending, EndingReader, combine_with_job
from launcher.jobs.peak_memory import PeakMemoryReader
from launcher.runs.continuation import make_recorded_command
from launcher.runs.goodput import Ledger
from launcher.runs.job_output import read_job_output
from launcher.runs.ledger_reader import LedgerReader
from launcher.runs.script_record import is_script_run
from launcher.runs.submission_record import read_records
from slurm.attempts import read_attempts

# Kinds of events after which a notice about a possible hang is out of date.
_HANG_ENDS = ("hang_over", "run_started", "rank_failed", "interrupted", "failed", "finished")


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run.

    Attributes:
        state: queued, running, requeued, done, stopped, failed, cancelled, or ended (the result is not known).
        detail: why it waits, where it runs, or why it ended.
        job: 'slurm 123', 'local 4711', or None for a run that was not submitted.
        step: optimizer steps done.
        checkpoint_step: optimizer step of the newest checkpoint.
        updated: time of the last event, seconds since 1970.
        reason: one word for how it ended, as `max_time`, `exception` or `hung` (see `launcher.jobs.ending`); empty
            while it runs.
        advice: what to do next, a short phrase.
        command: the command that continues it; empty if there is none.
        peak_memory: the highest of its ranks, in bytes; None if it was not recorded.
        peak_memory_of: what that is the peak of.
        goodput: what its time was spent on; None for a script, or if an older version wrote a part of it.
        is_script: whether it is a plain script, whose steps and checkpoints are not known.
        hang: the notice about a possible hang of a running run; empty without one, or after it was over.
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
    reason: str = ""
    advice: str = ""
    command: str = ""
    peak_memory: int | None = None
    peak_memory_of: str = ""
    is_script: bool = False
    hang: str = ""
    goodput: Ledger | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the run needs a new submission to continue."""
        return self.state not in ("queued", "running", "requeued")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        goodput = None if self.goodput is None else self.goodput.to_dict()
        return dataclasses.asdict(dataclasses.replace(self, goodput=None)) | {"goodput": goodput}


class RunProgress:
    """A run's progress by its events: fields of `RunStatus`, the ending of its last attempt, and its peak memory."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.attempts = 0
        self.plan: Mapping[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.updated: float | None = None
        self.hang = ""
        self.endings = EndingReader()
        self.memory = PeakMemoryReader()
        self.time = LedgerReader()
        for event in events:
            self.add(event)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.endings.step

    @property
    def checkpoint_step(self) -> int:
        """Optimizer step of the newest checkpoint; 0 without one."""
        return self.endings.checkpoint_step or 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Add one event, in the order of the file."""
        kind, time = event.get("kind"), event.get("time")
        if isinstance(time, int | float):
            self.updated = time
        self.attempts += kind == "run_started"
        if kind == "planned":
            plan = event.get("plan")
            self.plan = plan if isinstance(plan, dict) else {}
        metrics = event.get("metrics")
        if kind in ("first_step", "step", "epoch", "validation", "finished") and isinstance(metrics, dict):
            self.metrics.update(metrics)
        if kind in _HANG_ENDS:
            self.hang = ""
        elif kind == "hang_suspected":
            self.hang = as_text(event.get("message"))
        self.endings.add(event)
        self.memory.add(event)
        self.time.add(event)

    def watch(self, events: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The same events, each added when it is read."""
        for event in events:
            self.add(event)
            yield event


def read_run_status(run: Path, job: JobStatus | None = None, progress: RunProgress | None = None) -> RunStatus:
    """The state of the run in a directory; `job` is the status of its newest job, if it is known already."""
    progress = summarize_events(run / FILE_NAME) if progress is None else progress
    records = read_records(run)
    record = records[-1] if records else None
    if job is None:
        job = read_directory_status(run) if record is None else read_job_statuses([record])[0]
    starts = sum(len(read_attempts(Path(each["folder"]))) for each in records)
    ending = progress.endings.find_ending(run.name)
    if job.state == "unknown":
        job = JobStatus("running" if ending is None else "ended", job.detail)
    if record is not None and record.get("submitted", 0) > (progress.updated or 0):
        # The events are those of an earlier submission.
        output = read_job_output(record)
        text = "" if output is None else f"{remove_end(output.reason)} ({output.file})"
        ending = None if output is None else Ending("failed", "job_failed", text, "correct it, and submit it again")
    elif ending is None and progress.attempts:
        ending = progress.endings.describe_unreported()
    state, detail, ending = _combine(job, ending or Ending("ended", "", ""), starts)
    peak = progress.memory.find_peak()
    is_over = state not in ("running", "queued", "requeued", "done")
    can_continue = record is None and ending.can_resume and is_over and not progress.endings.script_arguments
    command = make_recorded_command(run, progress.plan) if can_continue else None
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
        reason=ending.reason,
        advice=f"{ending.advice}, {command.place}" if command is not None and command.place else ending.advice,
        command="" if command is None else command.text,
        peak_memory=peak.highest,
        peak_memory_of=peak.what if peak.highest is not None else "",
        is_script=is_script_run(run),
        hang=progress.hang if state == "running" else "",
        goodput=progress.time.ledger(),
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


def _combine(job: JobStatus, ending: Ending, starts: int) -> tuple[str, str, Ending]:
    """The run's state, its detail and its ending, from the job and from the ending by the events. Pure."""
    if job.state == "ended":
        return ending.state, "; ".join(filter(None, (ending.text, remove_end(job.detail)))), ending
    if job.state == "done":
        return "done", ending.text, ending
    if job.state in ("failed", "cancelled"):
        combined = combine_with_job(ending, job.state, job.detail)
        return job.state, combined.text, combined
    return "requeued" if job.state == "queued" and starts else job.state, job.detail, Ending("ended", "", "")


def summarize_events(events: Path) -> RunProgress:
    """The progress of a run by its event file."""
    return RunProgress(read_events(events) if events.exists() else ())
