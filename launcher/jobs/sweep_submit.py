"""Submits a sweep: checks all its members, creates their folders, and passes them to a back end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from launcher.config.command_line import path_of
from launcher.config.loading import build_config, read_sources, with_typed
from launcher.config.suggestions import NO_COMMAND, CommandKeys
from launcher.core.errors import Problem, RunDirectoryError, SubmitError
from launcher.jobs.backends.base import JobBackend
from launcher.jobs.backends.registry import find_backend
from launcher.jobs.submission import (
    JobOptions,
    Submission,
    SweepSubmission,
    make_folder,
    prepare,
    remove_empty_folders,
    remove_folder,
)
from launcher.jobs.submit import copy_code, private_folder
from launcher.jobs.sweep import Member, describe, make_members, read_sweep
from launcher.runs.submission_record import FOLDER
from launcher.runs.sweep_record import ARRAYS, MEMBERS, read_members, write_members
from launcher.runs.trust import check_run_folder
from slurm.array import read_array
from slurm.job import JobRequestError


def prepare_sweep(arguments: Namespace, overrides: Sequence[str], command: CommandKeys = NO_COMMAND) -> SweepSubmission:
    """Check every member and choose its run directory; creates nothing. The `overrides` apply to all members.

    Raises:
        SubmitError: the sweep, the array or an option is wrong.
        ConfigError: every problem of every member.
        RunDirectoryError: some members' runs exist already.
    """
    command = with_typed(command, overrides)
    base = read_sources(arguments.config, overrides, command)
    keys = (argument[2:].partition("=")[0] for argument in overrides if argument.startswith("--"))
    sets = read_sweep(arguments.sweep, [path_of(key) for key in keys])
    config = build_config({**base, "name": base.get("name")}, command)
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{config.digest()[:6]}"
    members = make_members(base, sets, name)
    try:
        choice = read_array(arguments.array, len(members))
    except JobRequestError as error:
        raise SubmitError(Problem(f"--{p.option}", p.message) for p in error.problems) from error
    find_backend(arguments.cluster).check_sweep(choice)
    options = JobOptions.from_arguments(arguments)
    submissions: list[Submission] = []
    existing: list[str] = []
    for index in choice.indices:
        try:
            submissions.append(prepare(members[index].config, options, os.environ))
        except RunDirectoryError as error:
            existing.append(f"member {index}: {error}")
    if existing:
        raise RunDirectoryError("\n".join(existing))
    path = submissions[0].place.path.parent / name
    check_run_folder(path)
    # A queued run has no config yet.
    if (path / "config.yaml").exists() or (path / FOLDER).exists():
        raise RunDirectoryError(f"{name!r} is already a run at {path}; choose another --name for the sweep")
    _refuse_changed_members(path, members)
    folder = path / ARRAYS / str(1 + sum(1 for _ in path.glob(f"{ARRAYS}/*")))
    return SweepSubmission(path, tuple(members), choice, tuple(submissions), folder)


def _refuse_changed_members(path: Path, members: Sequence[Member]) -> None:
    """An existing sweep may get more members; its present ones cannot change."""
    known = {each["index"]: each["overrides"] for each in read_members(path)}
    now = {member.index: json.loads(json.dumps(member.to_dict()["overrides"], default=str)) for member in members}
    changed = [index for index, overrides in known.items() if now.get(index) != overrides]
    if changed:
        raise RunDirectoryError(
            f"sweep {path.name!r} exists already at {path}, and its member {changed[0]} is "
            f"{describe(known[changed[0]])}; choose another --name, or give its values in the same order, new ones last"
        )


def submit_sweep(backend: JobBackend, sweep: SweepSubmission, *, snapshot: bool) -> str:
    """Submit a sweep; returns one line for the user. With `snapshot`, the jobs get a copy of the current code.

    Raises:
        SubmitError: the back end cannot be used from here, or the disk is full or read-only.
        QueueError: the back end refused the jobs.
    """
    backend.check(sweep.submissions[0].job)
    folder = sweep.folder
    is_new = not read_members(sweep.path)

    def create() -> Path:
        for each in sweep.submissions:
            make_folder(each)
        folder.mkdir(mode=0o700, parents=True)
        write_members(sweep.path, [member.to_dict() for member in sweep.members])
        return copy_code(folder, sweep.path.parent, snapshot=snapshot)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                (sweep.path / MEMBERS).unlink()
        for each in sweep.submissions:
            remove_folder(each)
        remove_empty_folders(folder.parent, sweep.path, sweep.path.parent)

    with private_folder(folder, create, remove) as cwd:
        return backend.submit_sweep(sweep, cwd)
