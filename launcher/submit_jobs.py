"""Queueing a submission: the one place where something outside is asked to run it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import Problem, QueueError, SubmitError
from launcher.local_job import start_detached
from launcher.snapshot import take_snapshot
from launcher.submission import Submission, make_folder, remove_folder, write_record

if TYPE_CHECKING:
    from slurm.task import FitRequest


def submit_slurm(submission: Submission, *, snapshot: bool, interface: str | None, max_fruitless: int) -> str:
    """Send the job through submitit; returns a line for the user.

    Raises:
        SubmitError: there is no SLURM here, or no space.
        QueueError: sbatch's own words.
    """
    from slurm.queue import has_slurm

    if not has_slurm():
        raise SubmitError([Problem("--cluster", "given slurm, but there is no sbatch on this machine; submit from a "
                                   "login node, or use --cluster local")])  # fmt: skip
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from slurm.render import JobExecutor
    from slurm.task import FitTask

    before = os.umask(0o077)
    try:
        make_folder(submission)
        cwd = users_code(submission.folder, submission.place.path.parent, snapshot=snapshot)
        request = fit_request(submission, cwd, interface, max_fruitless)
        executor = JobExecutor(submission.job, submission.folder, sys.executable)
        try:
            # submitit prints sbatch's words, and raises them too.
            with contextlib.redirect_stderr(io.StringIO()):
                job = executor.submit(FitTask(request))
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise QueueError(f"sbatch did not take the job: {str(error).strip()}") from error
        write_record(submission.folder, "slurm", job_id=job.job_id, nodes=submission.job.nodes)
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
        known = start_detached([*submission.command, "--resume", resume], cwd, submission.folder)
        write_record(submission.folder, "local", **known)
    except BaseException:  # Ctrl-C too leaves no folder of a job that is not queued; raised on
        remove_folder(submission)
        raise
    finally:
        os.umask(before)
    return f"process {known['pid']} runs in the background"


def fit_request(submission: Submission, cwd: Path, interface: str | None, max_fruitless: int) -> FitRequest:
    """What the nodes get of a submission.

    Args:
        submission: of one run.
        cwd: where the ranks find the user's code.
        interface: of the network; None for the one by which the nodes reach each other.
        max_fruitless: see `slurm.task.FitRequest`.
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
        fruitless_limit=max_fruitless,
        interface=interface,
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
