"""Jobs as background processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.core.own_modules import module_command
from launcher.jobs.backends.base import JobBackend, JobStatus, Record, SubmittedJob, cancel_on_error
from launcher.process.background import OUTPUT, is_running, request_stop, start_detached
from launcher.runs.lock import read_owner
from launcher.runs.submission_record import write_record
from launcher.runs.sweep_record import read_array_record, write_array

if TYPE_CHECKING:
    from launcher.jobs.submission import Submission, SweepSubmission
    from slurm.job import SlurmJob


class LocalBackend(JobBackend):
    """One background process for each run, or one that runs the members of a sweep."""

    name = "local"
    summary = "in the background on this machine"

    def check(self, job: SlurmJob) -> None:
        """Refuse several nodes."""
        if job.nodes > 1:
            raise SubmitError(
                [Problem("--nodes", f"given {job.nodes}, but --cluster local is one machine; leave out --nodes")]
            )

    def submit(self, submission: Submission, cwd: Path) -> SubmittedJob:
        """Start the process."""
        process = start_detached(_command(submission), cwd, submission.folder)
        return SubmittedJob({**process, "output": [OUTPUT]}, f"process {process['pid']} runs in the background")

    def submit_sweep(self, sweep: SweepSubmission, cwd: Path) -> str:
        """Start one process that runs the members, as many at once as `--array %N` allows."""
        folder = sweep.folder
        members = [
            {"run": str(each.place.path), "folder": str(each.folder), "command": _command(each)}
            for each in sweep.submissions
        ]
        write_array(folder, cluster=self.name, indices=list(sweep.choice.indices), at_once=sweep.choice.at_once or 1,
                    members=members)  # fmt: skip
        for each in sweep.submissions:
            write_record(each.folder, self.name, waits_in=str(folder))
        process = start_detached(module_command("launcher.jobs.backends.local_sweep", str(folder)), cwd, folder)
        with cancel_on_error(self, folder, lambda: process):
            write_array(folder, **process)
        return f"process {process['pid']} runs {len(members)} members in the background"

    def statuses(self, records: Sequence[Record]) -> list[JobStatus]:
        """Check the processes, and the owners of the run directories."""
        return [_status(record) for record in records]

    def cancel(self, record: Record) -> str:
        """Send SIGTERM."""
        if record.get("waits_in"):
            raise QueueError(
                f"run {_run_of(record).name!r} has not started; cancel its sweep ({self.describe(record)}), or wait "
                "until the run trains"
            )
        pid = record.get("pid")
        if not pid or not request_stop(pid, record.get("started")):
            raise QueueError(
                f"process {pid} does not run on this machine; to save and stop, send SIGTERM to the process that trains"
            )
        return f"process {pid} was asked to save and stop"

    def cancel_sweep(self, array: Record, members: Sequence[Record]) -> list[str]:
        """Send SIGTERM to the process that runs the members, unless it has ended."""
        del members
        return [self.cancel(array)] if _is_running(array) else []

    def describe(self, record: Record) -> str:
        """The process, or the sweep that a member waits for."""
        if record.get("waits_in"):
            return f"sweep {Path(record['waits_in']).parent.parent.name}"
        return f"{self.name} {record.get('pid')}"


def read_directory_status(run: Path) -> JobStatus:
    """The status of a run by the owner of its directory, for runs that were not submitted."""
    state = read_owner(run)[1]
    return JobStatus(state if state in ("running", "unknown") else "ended")


def _status(record: Record) -> JobStatus:
    if record.get("waits_in"):
        if _is_running(read_array_record(Path(record["waits_in"]))):
            return JobStatus("queued", "waits for earlier members")
        return JobStatus("ended", "its sweep ended before it started")
    return JobStatus("running") if _is_running(record) else read_directory_status(_run_of(record))


def _is_running(record: Record) -> bool:
    return record.get("host") == os.uname().nodename and is_running(record.get("pid", 0), record.get("started"))


def _run_of(record: Record) -> Path:
    """The run directory: a record is in `RUN/submissions/NUMBER`."""
    return Path(record["folder"]).parent.parent


def _command(submission: Submission) -> list[str]:
    if submission.script is not None:
        ranks = ("--nproc-per-node", str(submission.config.devices))
        return [*submission.command, *ranks, *submission.script.script]
    resume = "auto" if submission.resume_from is None else str(submission.resume_from)
    return [*submission.command, "--resume", resume]
