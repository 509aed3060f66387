"""Jobs of a SLURM cluster, submitted through submitit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.jobs.backends.base import JobBackend, JobStatus, Record, SubmittedJob, cancel_on_error
from launcher.runs.submission_record import list_slurm_output, write_record
from launcher.runs.sweep_record import write_array
from slurm.queue import (
    UNKNOWN,
    JobState,
    QueueCommandError,
    cancel_job,
    has_slurm,
    read_array_states,
    read_job_state,
    read_max_array_size,
)

if TYPE_CHECKING:
    from launcher.jobs.submission import Submission, SweepSubmission
    from slurm.array import ArrayChoice
    from slurm.job import SlurmJob
    from slurm.render import ArrayExecutor, JobExecutor
    from slurm.task import FitRequest

# In the messages of SLURM's commands if there is no configuration, or if the controller does not answer.
_NO_CLUSTER = re.compile(
    r"unable to contact slurm controller|could not establish a configuration|unable to establish config"
    r"|cannot resolve|unable to resolve|_fetch_child: failed to fetch remote configs|connection refused"
    r"|slurm\.conf.*no such file|unable to process configuration file",
    re.IGNORECASE,
)
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED")


class SlurmBackend(JobBackend):
    """One job for each run, or one job array for a sweep."""

    name = "slurm"
    summary = "on the SLURM cluster"

    def check(self, job: SlurmJob) -> None:
        """Refuse a machine without sbatch."""
        del job
        if not has_slurm():
            raise SubmitError([Problem("--cluster", "given slurm, but there is no sbatch on this machine; submit from "
                                       "a login node, or use --cluster local")])  # fmt: skip

    def check_sweep(self, choice: ArrayChoice) -> None:
        """Refuse more members than a job array can have (MaxArraySize)."""
        size, last = read_max_array_size(), choice.indices[-1]
        if size is not None and last >= size:
            raise SubmitError([Problem("--sweep", f"its last member is number {last}, and this cluster's arrays end at "
                                       f"{size - 1} (MaxArraySize); submit smaller sweeps")])  # fmt: skip

    def render(self, submission: Submission) -> str:
        """The script that sbatch gets, byte for byte."""
        return _executor(submission).batch_script()

    def render_sweep(self, sweep: SweepSubmission) -> str:
        """The same for the job array."""
        return _array_executor(sweep).batch_script()

    def submit(self, submission: Submission, cwd: Path) -> SubmittedJob:
        """Submit the job."""
        from slurm.task import FitTask

        executor = _executor(submission)
        with self._submitting(executor, submission.folder, "job"):
            job_id = executor.submit(FitTask(_fit_request(submission, cwd))).job_id
        record = {"job_id": job_id, "nodes": submission.job.nodes, "output": list_slurm_output(job_id)}
        return SubmittedJob(record, f"job {job_id} is queued")

    def submit_sweep(self, sweep: SweepSubmission, cwd: Path) -> str:
        """Submit the job array."""
        from slurm.task import FitTask

        executor = _array_executor(sweep)
        with self._submitting(executor, sweep.folder, "array"):
            job_id = executor.submit_members([FitTask(_fit_request(each, cwd)) for each in sweep.submissions])
            for index, each in zip(sweep.choice.indices, sweep.submissions, strict=True):
                member = f"{job_id}_{index}"
                write_record(each.folder, self.name, job_id=member, nodes=each.job.nodes, sweep=sweep.name,
                             output=list_slurm_output(member, sweep.name))  # fmt: skip
            write_array(sweep.folder, cluster=self.name, job_id=job_id, indices=list(sweep.choice.indices))
        return f"array {job_id} of {len(sweep.submissions)} jobs is queued"

    def statuses(self, records: Sequence[Record]) -> list[JobStatus]:
        """Ask SLURM, once for all members of an array."""
        ids = [str(record.get("job_id")) for record in records]
        sizes = Counter(_array_of(job_id) for job_id in ids)
        arrays: dict[str, dict[int, JobState]] = {}

        def ask(job_id: str) -> JobState:
            array = _array_of(job_id)
            if array is None or sizes[array] == 1:
                return read_job_state(job_id)
            if array not in arrays:
                arrays[array] = read_array_states(array)
            return arrays[array].get(int(job_id.rpartition("_")[2]), JobState(UNKNOWN))

        found: list[JobStatus] = []
        for job_id in ids:
            try:
                found.append(to_job_status(ask(job_id)))
            except QueueCommandError as error:
                found.append(JobStatus("ended", f"SLURM does not answer: {error}"))
        return found

    def cancel(self, record: Record) -> str:
        """Cancel the job, the array or its member."""
        try:
            cancel_job(str(record["job_id"]))
        except QueueCommandError as error:
            raise QueueError(str(error)) from error
        kind = "array" if "indices" in record else "job"
        return f"{kind} {record['job_id']} is cancelled; its ranks save if SLURM gives them the time"

    def cancel_sweep(self, array: Record, members: Sequence[Record]) -> list[str]:
        """Cancel the job array."""
        del members
        return [self.cancel(array)]

    @contextlib.contextmanager
    def _submitting(self, executor: JobExecutor, folder: Path, kind: str) -> Generator[None]:
        """Translate submitit's errors, and cancel a job that sbatch accepted before the error."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        with cancel_on_error(self, folder, lambda: _record_of(executor)):
            try:
                # submitit prints sbatch's message, and raises it too.
                with contextlib.redirect_stderr(io.StringIO()):
                    yield
            except (FailedJobError, FailedSubmissionError) as error:
                raise QueueError(describe_refusal(kind, str(error))) from error


def describe_refusal(kind: str, text: str) -> str:
    """The message of sbatch, with what to do; only one line of it if no cluster answered. Pure."""
    silent = next((line.strip(" .") for line in text.splitlines() if _NO_CLUSTER.search(line)), None)
    if silent is not None:
        return (f"no SLURM cluster answered: {silent}; check it with `sinfo`, or submit to this machine with "
                "--cluster local")  # fmt: skip
    return f"sbatch refused the {kind}: {text.strip()}; change the options and submit again"


def to_job_status(state: JobState) -> JobStatus:
    """Translate SLURM's state. Pure."""
    if state.state == UNKNOWN:
        return JobStatus("ended", "SLURM no longer knows the job")
    if not state.has_ended:
        return JobStatus("running" if state.state in _RUNNING else "queued", state.reason)
    if state.state == "COMPLETED":
        return JobStatus("done")
    code = f", exit code {state.exit_code}" if state.exit_code else ""
    return JobStatus("cancelled" if state.state == "CANCELLED" else "failed", f"{state.state}{code}")


def _record_of(executor: JobExecutor) -> Record | None:
    return None if executor.submitted_id is None else {"job_id": executor.submitted_id}


def _array_of(job_id: str) -> str | None:
    """The array 42 of the member 42_7; None for a job outside of arrays."""
    array, separator, _ = job_id.partition("_")
    return array if separator else None


def _executor(submission: Submission) -> JobExecutor:
    from slurm.render import JobExecutor

    return JobExecutor(submission.job, submission.folder, sys.executable)


def _array_executor(sweep: SweepSubmission) -> ArrayExecutor:
    from slurm.render import ArrayExecutor

    job = dataclasses.replace(sweep.submissions[0].job, name=sweep.name)
    return ArrayExecutor(job, sweep.folder, sys.executable, sweep.choice)


def _fit_request(submission: Submission, cwd: Path) -> FitRequest:
    """The request for the nodes; `cwd` is the folder with the user's code."""
    from slurm.task import FitRequest

    return FitRequest(
        run=str(submission.place.path),
        folder=str(submission.folder),
        command=submission.command,
        cwd=str(cwd),
        nodes=submission.job.nodes,
        ranks_per_node=int(submission.config.devices),
        signal=submission.job.signal,
        resume_from=None if submission.resume_from is None else str(submission.resume_from),
        fruitless_limit=submission.options.max_fruitless,
        interface=submission.options.interface,
        join_timeout=submission.options.join_timeout,
        script=() if submission.script is None else submission.script.script,
    )
