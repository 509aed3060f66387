"""Submits a run: creates its folder with a copy of the code, and passes it to a back end."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path

from launcher.core.atomic_write import make_private
from launcher.core.errors import RunDirectoryError
from launcher.jobs.backends.base import JobBackend, cancel_on_error, disk_error
from launcher.jobs.snapshot import take_snapshot
from launcher.jobs.status import read_run_status
from launcher.jobs.submission import Submission, make_folder, remove_folder
from launcher.runs.submission_record import write_record


def submit_run(backend: JobBackend, submission: Submission, *, snapshot: bool) -> str:
    """Submit a run; returns one line for the user. With `snapshot`, the job gets a copy of the current code.

    Raises:
        SubmitError: the back end cannot be used from here, or the disk is full or read-only.
        QueueError: the back end refused the job.
    """
    backend.check(submission.job)
    folder = submission.folder

    def prepare() -> Path:
        make_folder(submission)
        return copy_code(folder, submission.place.path.parent, snapshot=snapshot)

    with private_folder(folder, prepare, lambda: remove_folder(submission)) as cwd:
        job = backend.submit(submission, cwd)
        with cancel_on_error(backend, folder, lambda: job.record):
            write_record(folder, backend.name, **job.record)
    return job.message


def refuse_running(submission: Submission) -> None:
    """Raise `RunDirectoryError` if the run is queued or running already."""
    path = submission.place.path
    status = read_run_status(path) if path.exists() else None
    if status is not None and not status.has_ended:
        raise RunDirectoryError(
            f"run {submission.name!r} is {status.state} already ({status.job or 'on this machine'}); "
            f"choose another --name, or end it first: launcher cancel {submission.name}"
        )


@contextlib.contextmanager
def private_folder(folder: Path, prepare: Callable[[], Path], remove: Callable[[], None]) -> Generator[Path]:
    """Create a submission's folder, readable by the user alone; remove it if the submission fails.

    `prepare` creates it and returns the folder with the user's code, which the context yields. `remove` reverts it.

    Raises:
        SubmitError: the disk is full or read-only.
    """
    before = os.umask(0o077)
    try:
        cwd = prepare()
        # The job inherits the umask, and runs the user's code.
        os.umask(before)
        yield cwd
        make_private(folder)
    except BaseException as error:  # also Ctrl-C: a refused job leaves no folder; raised again
        remove()
        if isinstance(error, OSError):
            raise disk_error(folder, error) from error
        raise
    finally:
        os.umask(before)


def copy_code(folder: Path, runs: Path, *, snapshot: bool) -> Path:
    """Copy the user's code, but not the `runs`; returns the working directory of the ranks."""
    here = Path.cwd()
    copy = take_snapshot(here, folder / "code", runs) if snapshot else None
    if snapshot and copy is None:
        sys.stderr.write("notice: this is not a git repository, so the code is not copied; later edits reach the job\n")
    return copy or here
