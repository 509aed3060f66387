"""The abstract base of the job back ends.

A back end starts a job and returns its record, which the launcher keeps in the submission's folder and passes to the
other methods. The record's `output` lists the files of the job's own output, as patterns relative to that folder.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.runs.submission_record import write_record
from launcher.runs.sweep_record import write_array

if TYPE_CHECKING:
    from launcher.jobs.submission import Submission, SweepSubmission
    from slurm.array import ArrayChoice
    from slurm.job import SlurmJob

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JobStatus:
    """The status of a job, by its back end.

    Attributes:
        state: `ended` without a known result, `unknown` on another machine; the run's events then decide.
        detail: why the job waits, where it runs, or how it ended.
    """

    state: Literal["queued", "running", "done", "failed", "cancelled", "ended", "unknown"]
    detail: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether the job will not run again."""
        return self.state not in ("queued", "running", "unknown")


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """A job that a back end has accepted: its record, and one line for the user."""

    record: Record
    message: str


class JobBackend(ABC):
    """A place where jobs run. `name` is the value of `--cluster` and of `cluster` in records; help shows `summary`."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def check(self, job: SlurmJob) -> None:
        """Check that the job can be submitted from this machine.

        Raises:
            SubmitError: it cannot.
        """

    @abstractmethod
    def submit(self, submission: Submission, cwd: Path) -> SubmittedJob:
        """Start or queue `submission.command` in the folder `cwd`.

        Raises:
            QueueError: the job was refused.
        """

    @abstractmethod
    def statuses(self, records: Sequence[Record]) -> list[JobStatus]:
        """The status of each job; `ended` with the reason for a job that the back end cannot ask about."""

    @abstractmethod
    def cancel(self, record: Record) -> str:
        """Stop a job; returns one line for the user.

        Raises:
            QueueError: the job cannot be stopped.
        """

    def describe(self, record: Record) -> str:
        """The job's name for tables and messages."""
        return f"{self.name} {record.get('job_id', '')}".rstrip()

    def render(self, submission: Submission) -> str | None:
        """The script that `--dry-run` prints; None if there is none."""
        del submission

    def check_sweep(self, choice: ArrayChoice) -> None:
        """Check that a sweep of this size can be submitted, also for a dry run.

        Raises:
            SubmitError: it cannot.
        """
        del choice

    def render_sweep(self, sweep: SweepSubmission) -> str | None:
        """The script that `--dry-run` prints for a sweep; None if there is none."""
        del sweep

    def submit_sweep(self, sweep: SweepSubmission, cwd: Path) -> str:
        """Submit the chosen members, by default one job each, and write their records; returns one line for the user.

        Raises:
            QueueError: a job was refused; the others are cancelled.
        """
        submitted: list[Record] = []
        try:
            for each in sweep.submissions:
                job = self.submit(each, cwd)
                submitted.append(job.record)
                write_record(each.folder, self.name, **job.record)
            write_array(sweep.folder, cluster=self.name, indices=list(sweep.choice.indices))
        except BaseException:  # also Ctrl-C: no job remains that the sweep does not know; raised again
            for record in submitted:
                with contextlib.suppress(QueueError):
                    self.cancel(record)
            raise
        return f"{len(submitted)} jobs were submitted"

    def cancel_sweep(self, array: Record, members: Sequence[Record]) -> list[str]:
        """Stop the jobs of one submission of a sweep, given its and its members' records; returns lines for the user.

        Raises:
            QueueError: a job cannot be stopped.
        """
        del array
        running = zip(members, self.statuses(members), strict=True)
        return [self.cancel(record) for record, status in running if not status.has_ended]


@contextlib.contextmanager
def cancel_on_error(backend: JobBackend, folder: Path, find_record: Callable[[], Record | None]) -> Generator[None]:
    """Cancel a job that was accepted but cannot be recorded. `find_record` returns None until a job was accepted.

    Raises:
        SubmitError: the disk is full or read-only; the job is cancelled.
        QueueError: the job was accepted, but can neither be recorded nor cancelled.
    """
    try:
        yield
    except BaseException as error:  # also Ctrl-C: no job remains without a record; raised again
        record, outcome = find_record(), ""
        if record is not None:
            job = backend.describe(record)
            try:
                backend.cancel(record)
            except QueueError as failed:
                raise QueueError(
                    f"job {job} was accepted, but cannot be recorded in {folder} ({error}) or cancelled ({failed}); "
                    "cancel it manually"
                ) from error
            outcome = f"; job {job} was accepted and is now cancelled"
        if isinstance(error, OSError):
            raise disk_error(folder, error, outcome) from error
        if outcome and isinstance(error, QueueError):
            raise QueueError(f"{error}{outcome}") from error
        raise


def disk_error(folder: Path, error: OSError, outcome: str = "") -> SubmitError:
    """The error for a disk that is full or read-only; `outcome` describes what was already started."""
    message = f"{folder} cannot be written: {error.strerror or error}{outcome}"
    return SubmitError([Problem("runs_dir", f"{message}; choose a folder with space where you may write")])
