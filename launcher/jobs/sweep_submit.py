"""From a sweep's members to one job array, or to a process that runs them here one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.loading import build_config, path_of, read_sources
from launcher.core.atomic_write import make_private
from launcher.core.errors import Problem, RunDirectoryError, SubmitError
from launcher.core.own_modules import module_command
from launcher.jobs.submission import Submission, make_folder, prepare, remove_folder, terms_of
from launcher.jobs.submit import check_slurm, fit_request, no_space, noting, sending, users_code
from launcher.jobs.sweep import Member, describe, make_members, read_sweep
from launcher.runs.submission_record import FOLDER, write_record
from launcher.runs.sweep_record import ARRAYS, MEMBERS, read_members, write_array, write_members
from launcher.runs.trust import check_run_folder
from slurm.array import ArrayChoice, read_array
from slurm.job import JobRequestError

if TYPE_CHECKING:
    from slurm.render import ArrayExecutor


@dataclass(frozen=True)
class SweepSubmission:
    """A sweep that is to be queued.

    Attributes:
        path: the sweep's folder, beside those of its runs.
        members: all of them.
        choice: which are to run now.
        submissions: of the chosen members, in the order of their indices.
        folder: of this submission: script, pickles and output of the tasks; nothing is made yet.
    """

    path: Path
    members: tuple[Member, ...]
    choice: ArrayChoice
    submissions: tuple[Submission, ...]
    folder: Path

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name


def prepare_sweep(options: Namespace, overrides: Sequence[str], given: Mapping[str, str | None]) -> SweepSubmission:
    """Check every member and decide where its run goes; makes nothing.

    Args:
        options: of `launcher submit`.
        overrides: settings for all members, as words of the command line.
        given: SLURM's options, by sbatch's names.

    Raises:
        SubmitError: the sweep, the array or an option is wrong.
        ConfigError: every problem of every member.
        RunDirectoryError: some members' runs exist already.
    """
    base = read_sources(options.config, overrides)
    words = (word[2:].partition("=")[0] for word in overrides if word.startswith("--"))
    sets = read_sweep(options.sweep, [path_of(word) for word in words])
    whole = build_config({**base, "name": base.get("name")})
    name = whole.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{whole.digest()[:6]}"
    members = make_members(base, sets, name)
    try:
        choice = read_array(options.array, len(members))
    except JobRequestError as error:
        raise SubmitError(Problem(f"--{p.option}", p.message) for p in error.problems) from error
    if options.cluster == "slurm":
        _check_size(choice)
    terms = terms_of(options)
    submissions: list[Submission] = []
    taken: list[str] = []
    for index in choice.indices:
        try:
            submission = prepare(members[index].config, given, os.environ, options.export_env, terms)
            submissions.append(submission)
        except RunDirectoryError as error:
            taken.append(f"member {index}: {error}")
    if taken:
        raise RunDirectoryError("\n".join(taken))
    path = submissions[0].place.path.parent / name
    check_run_folder(path)
    # One that is queued has no config yet.
    if (path / "config.yaml").exists() or (path / FOLDER).exists():
        raise RunDirectoryError(f"{name!r} is a run already at {path}; choose another --name for the sweep")
    _refuse_others(path, members)
    folder = path / ARRAYS / str(1 + sum(1 for _ in path.glob(f"{ARRAYS}/*")))
    return SweepSubmission(path, tuple(members), choice, tuple(submissions), folder)


def _refuse_others(path: Path, members: Sequence[Member]) -> None:
    """A sweep that is there already may get more members; those that it has stay what they are."""
    known = {each["index"]: each["overrides"] for each in read_members(path)}
    now = {member.index: json.loads(json.dumps(member.to_dict()["overrides"], default=str)) for member in members}
    changed = [index for index, overrides in known.items() if now.get(index) != overrides]
    if changed:
        raise RunDirectoryError(
            f"sweep {path.name!r} exists already at {path}, and its member {changed[0]} is "
            f"{describe(known[changed[0]])}; choose another --name, or give its values in the same order, new ones last"
        )


def _check_size(choice: ArrayChoice) -> None:
    from slurm.queue import max_array_size

    size = max_array_size()
    if size is not None and choice.indices[-1] >= size:
        last = f"its last member is number {choice.indices[-1]}"
        raise SubmitError([Problem("--sweep", f"{last}, and this cluster's arrays end at {size - 1} (MaxArraySize); "
                                   "sweep less at once")])  # fmt: skip


def array_executor(sweep: SweepSubmission) -> ArrayExecutor:
    """The executor of submitit for the array; it makes nothing before it is asked to submit."""
    from slurm.render import ArrayExecutor

    job = dataclasses.replace(sweep.submissions[0].job, name=sweep.name)
    return ArrayExecutor(job, sweep.folder, sys.executable, sweep.choice)


def submit_array(sweep: SweepSubmission, *, snapshot: bool) -> str:
    """Send the array; returns a line for the user.

    Raises:
        SubmitError: there is no SLURM here, or no space.
        QueueError: sbatch's own words.
    """
    check_slurm()
    from slurm.task import FitTask

    with _made(sweep, snapshot=snapshot) as (folder, cwd):
        tasks = [FitTask(fit_request(each, cwd)) for each in sweep.submissions]
        executor = array_executor(sweep)
        with sending(executor, folder, "the array"):
            job_id = executor.submit_members(tasks)
            for index, each in zip(sweep.choice.indices, sweep.submissions, strict=True):
                write_record(each.folder, "slurm", job_id=f"{job_id}_{index}", nodes=each.job.nodes, sweep=sweep.name)
            write_array(folder, cluster="slurm", job_id=job_id, indices=list(sweep.choice.indices))
    return f"array {job_id} of {len(sweep.submissions)} jobs is queued"


def submit_here(sweep: SweepSubmission, *, snapshot: bool) -> str:
    """Start a process that runs the members one after another, or as many at once as `--array %N` says.

    Raises:
        SubmitError: more than one node was asked for, or no space.
        QueueError: it cannot be started.
    """
    from launcher.process.background import start_detached

    nodes = sweep.submissions[0].job.nodes
    if nodes > 1:
        raise SubmitError([Problem("--nodes", f"given {nodes}; --cluster local is this machine alone")])
    with _made(sweep, snapshot=snapshot) as (folder, cwd):
        write_array(folder, cluster="local", indices=list(sweep.choice.indices), at_once=sweep.choice.at_once or 1,
                    members=[_local_member(each) for each in sweep.submissions])  # fmt: skip
        for each in sweep.submissions:
            write_record(each.folder, "local", waits_in=str(folder))
        known = start_detached(module_command("launcher.jobs.sweep_local", str(folder)), cwd, folder)
        with noting(folder, known):
            write_array(folder, **known)
    return f"process {known['pid']} runs {len(sweep.submissions)} members in the background"


def _local_member(submission: Submission) -> dict[str, Any]:
    resume = "auto" if submission.resume_from is None else str(submission.resume_from)
    return {"run": str(submission.place.path), "folder": str(submission.folder),
            "command": [*submission.command, "--resume", resume]}  # fmt: skip


@contextlib.contextmanager
def _made(sweep: SweepSubmission, *, snapshot: bool) -> Generator[tuple[Path, Path]]:
    """All folders, private; taken back if the sweep is not queued."""
    folder = sweep.folder
    before = os.umask(0o077)
    is_new = not read_members(sweep.path)
    try:
        for each in sweep.submissions:
            make_folder(each)
        try:
            folder.mkdir(mode=0o700, parents=True)
            write_members(sweep.path, [member.to_dict() for member in sweep.members])
            cwd = users_code(folder, sweep.path.parent, snapshot=snapshot)
            # What is started here inherits it, and runs the user's code.
            os.umask(before)
            yield folder, cwd
            make_private(folder)
        except OSError as error:
            raise no_space(folder, error) from error
    except BaseException:  # Ctrl-C too leaves no folder of what is not queued; raised on
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                (sweep.path / MEMBERS).unlink()
        for each in sweep.submissions:
            remove_folder(each)
        for emptied in (folder.parent, sweep.path, sweep.path.parent):
            # With something in it, it stays.
            with contextlib.suppress(OSError):
                emptied.rmdir()
        raise
    finally:
        os.umask(before)
