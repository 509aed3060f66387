"""Queueing a submission: the one place where something outside is asked to run it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.core.atomic_write import make_private
from launcher.core.errors import Problem, QueueError, SubmitError
from launcher.jobs.snapshot import take_snapshot
from launcher.jobs.submission import Submission, make_folder, remove_folder
from launcher.process.background import ask_to_stop, start_detached
from launcher.runs.submission_record import write_record

if TYPE_CHECKING:
    from slurm.render import JobExecutor
    from slurm.task import FitRequest


def submit_slurm(submission: Submission, *, snapshot: bool) -> str:
    """Send the job through submitit; returns a line for the user.

    Raises:
        SubmitError: there is no SLURM here, or no space.
        QueueError: sbatch's own words.
    """
    check_slurm()
    from slurm.render import JobExecutor
    from slurm.task import FitTask

    before = os.umask(0o077)
    try:
        make_folder(submission)
        cwd = users_code(submission.folder, submission.place.path.parent, snapshot=snapshot)
        request = fit_request(submission, cwd)
        executor = JobExecutor(submission.job, submission.folder, sys.executable)
        # SLURM gives it to the job, which runs the user's code.
        os.umask(before)
        with sending(executor, submission.folder, "the job"):
            job = executor.submit(FitTask(request))
            write_record(submission.folder, "slurm", job_id=job.job_id, nodes=submission.job.nodes)
        make_private(submission.folder)
    except BaseException:  # Ctrl-C too leaves no folder of a job that is not queued; raised on
        remove_folder(submission)
        raise
    finally:
        os.umask(before)
    return f"job {job.job_id} is queued"


def submit_local(submission: Submission, *, snapshot: bool) -> str:
    """Start the run in the background; returns a line for the user.

    Raises:
        SubmitError: more than one node was asked for, or no space.
        QueueError: it cannot be started.
    """
    if submission.job.nodes > 1:
        raise SubmitError(
            [
                Problem(
                    "--nodes",
                    f"given {submission.job.nodes}; --cluster local is this machine alone, so leave out --nodes",
                )
            ]
        )
    before = os.umask(0o077)
    try:
        make_folder(submission)
        cwd = users_code(submission.folder, submission.place.path.parent, snapshot=snapshot)
        resume = "auto" if submission.resume_from is None else str(submission.resume_from)
        # The process runs the user's code.
        os.umask(before)
        known = start_detached([*submission.command, "--resume", resume], cwd, submission.folder)
        with noting(submission.folder, known):
            write_record(submission.folder, "local", **known)
    except BaseException:  # Ctrl-C too leaves no folder of a job that is not queued; raised on
        remove_folder(submission)
        raise
    finally:
        os.umask(before)
    return f"process {known['pid']} runs in the background"


def batch_script(submission: Submission) -> str:
    """The script that sbatch would get, byte for byte."""
    from slurm.render import JobExecutor

    return JobExecutor(submission.job, submission.folder, sys.executable).batch_script()


def check_slurm() -> None:
    """Whether jobs can be queued from here.

    Raises:
        SubmitError: there is no SLURM.
    """
    from slurm.queue import has_slurm

    if not has_slurm():
        raise SubmitError([Problem("--cluster", "given slurm, but there is no sbatch on this machine; submit from a "
                                   "login node, or use --cluster local")])  # fmt: skip


@contextlib.contextmanager
def sending(executor: JobExecutor, folder: Path, what: str) -> Generator[None]:
    """Around sending and noting a job: one that SLURM took and that cannot be noted here is cancelled again.

    Args:
        executor: that sends it.
        folder: of the submission.
        what: the job, in a message.

    Raises:
        QueueError: sbatch's own words.
        SubmitError: no space for what belongs to the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from slurm.queue import QueueCommandError, cancel_job

    try:
        # submitit prints sbatch's words, and raises them too.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except BaseException as error:  # Ctrl-C too leaves no job that nobody knows of; raised on
        became = ""
        if executor.taken is not None:
            try:
                cancel_job(executor.taken)
                became = f"; job {executor.taken} was queued already and is cancelled again"
            except QueueCommandError as failed:
                raise QueueError(
                    f"job {executor.taken} is queued, but cannot be noted in {folder} ({error}) nor cancelled "
                    f"({failed}); run: scancel {executor.taken}"
                ) from error
        if isinstance(error, FailedJobError | FailedSubmissionError):
            raise QueueError(f"sbatch did not take {what}: {str(error).strip()}{became}") from error
        if isinstance(error, OSError):
            raise no_space(folder, error, became) from error
        raise


@contextlib.contextmanager
def noting(folder: Path, known: Mapping[str, Any]) -> Generator[None]:
    """Around noting a process that was started: one that cannot be noted is ended again.

    Args:
        folder: of the submission.
        known: from `launcher.process.background.start_detached`.

    Raises:
        SubmitError: no space for the note.
    """
    try:
        yield
    except BaseException as error:  # Ctrl-C too leaves no process that nobody knows of; raised on
        ask_to_stop(known["pid"], known["started"])
        if isinstance(error, OSError):
            raise no_space(folder, error, f"; process {known['pid']} is ended again") from error
        raise


def no_space(folder: Path, error: OSError, became: str = "") -> SubmitError:
    """What to tell of a disk that is full or read-only, and what became of what had begun."""
    where = f"{folder} cannot be written: {error.strerror or error}"
    return SubmitError([Problem("runs_dir", f"{where}{became}; choose a folder with space where you may write")])


def fit_request(submission: Submission, cwd: Path) -> FitRequest:
    """What the nodes get of a submission.

    Args:
        submission: of one run.
        cwd: where the ranks find the user's code.
    """
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
        fruitless_limit=submission.terms.max_fruitless,
        interface=submission.terms.interface,
        join_timeout=submission.terms.join_timeout,
    )


def users_code(folder: Path, runs: Path, *, snapshot: bool) -> Path:
    """Where the ranks find the user's code.

    Args:
        folder: of the submission, for the copy.
        runs: folder of the runs, which is not copied.
        snapshot: whether to copy the code as it is now.
    """
    here = Path.cwd()
    if not snapshot:
        return here
    copy = take_snapshot(here, folder / "code", runs)
    if copy is None:
        sys.stderr.write("notice: no snapshot of the code, as this is no git repository: later edits reach the job\n")
    return copy or here
