"""A run to submit: one frozen record, made from a config and a job's options. A dry run shows the same record."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.core.atomic_write import write_file
from launcher.core.errors import Problem, SubmitError
from launcher.core.own_modules import module_command
from launcher.core.secrets import references
from launcher.runs.directory import RunPlace, find_run
from launcher.runs.submission_record import FOLDER
from slurm.job import (
    JobRequestError,
    OptionProblem,
    SlurmJob,
    find_contradictions,
    names_to_export,
    ranks_per_node,
    read_job,
)


@dataclass(frozen=True, slots=True)
class AttemptOptions:
    """Options that every attempt of a job uses.

    Attributes:
        interface: network interface; None for the one on which the nodes reach each other.
        max_fruitless: attempts in a row without a saved step, after which the job is not requeued.
        join_timeout: seconds that the nodes wait for each other.
    """

    interface: str | None = None
    max_fruitless: int = 3
    join_timeout: float = 600.0

    def find_problems(self) -> list[OptionProblem]:
        """Every value that is out of range."""
        found: list[OptionProblem] = []
        if self.max_fruitless < 1:
            found.append(OptionProblem("max-fruitless", f"given {self.max_fruitless}; expected at least 1"))
        if not 0 < self.join_timeout < math.inf:
            message = f"given {self.join_timeout:g}; expected seconds, more than 0"
            found.append(OptionProblem("join-timeout", message))
        return found


@dataclass(frozen=True)
class Submission:
    """A run to submit.

    Attributes:
        config: of the run, with all that the job fixes: name, folder of the runs, ranks and nodes.
        job: the request to SLURM.
        place: the run's directory.
        folder: of this submission, in the run's directory; not created yet.
        resume_from: checkpoint to start from.
        attempts: options of its attempts.
    """

    config: RunConfig
    job: SlurmJob
    place: RunPlace
    folder: Path
    resume_from: Path | None
    attempts: AttemptOptions = AttemptOptions()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.place.path.name

    @property
    def command(self) -> tuple[str, ...]:
        """The training command of each node; the node adds how to start ranks."""
        return module_command("launcher", "fit", "--config", str(self.folder / "config.yaml"))


def read_attempt_options(options: argparse.Namespace) -> AttemptOptions:
    """The attempts' options among those of `launcher submit`."""
    return AttemptOptions(options.interface, options.max_fruitless, options.join_timeout)


def prepare(
    config: RunConfig,
    given: Mapping[str, str | None],
    env: Mapping[str, str],
    export: Sequence[str] = (),
    attempts: AttemptOptions = AttemptOptions(),
) -> Submission:
    """Check everything and choose the run directory; creates nothing.

    Args:
        config: of the run.
        given: SLURM's options, by sbatch's names; they override the config's `slurm`.
        env: the submitting shell's variables; only their names are used.
        export: names of more variables for the job.
        attempts: options of the job's attempts.

    Raises:
        SubmitError: lists every option that is wrong or contradicts the config.
        RunDirectoryError, ResumeError: see `launcher.runs.directory.find_run`.
    """
    job = _read_job(config, given, env, export, attempts)
    place = find_run(config)
    devices = config.devices if isinstance(config.devices, int) else None
    fixed = dataclasses.replace(
        config,
        name=place.path.name,
        runs_dir=str(place.path.parent),
        devices=ranks_per_node(job, devices),
        num_nodes=job.nodes,
        accelerator="gpu" if job.gpus_per_node and config.accelerator == "auto" else config.accelerator,
        resume="none",
    )
    number = 1 + sum(1 for _ in place.path.glob(f"{FOLDER}/*"))
    return Submission(
        config=fixed,
        job=dataclasses.replace(job, name=place.path.name),
        place=place,
        folder=place.path / FOLDER / str(number),
        resume_from=None if config.resume in ("none", "auto") else place.resume_from,
        attempts=attempts,
    )


def _read_job(
    config: RunConfig,
    given: Mapping[str, str | None],
    env: Mapping[str, str],
    export: Sequence[str],
    attempts: AttemptOptions,
) -> SlurmJob:
    problems = [OptionProblem("export-env", f"given {name!r}, which is not set here; set it, or leave it out")
                for name in export if name not in env]  # fmt: skip
    problems += attempts.find_problems()
    if any(letter in config.runs_dir for letter in "%\n\r"):
        message = f"given {config.runs_dir!r}; sbatch replaces '%' and breaks at line ends; use another folder"
        problems.append(OptionProblem("runs_dir", message))
    job = SlurmJob("unnamed")
    try:
        variables = names_to_export(env, [*export, *references(config.to_dict(), env)])
        job = read_job(job.name, with_config(given, config), variables)
    except JobRequestError as error:
        problems += error.problems
    else:
        fixed = {key: value if isinstance(value, int) else None
                 for key, value in (("devices", config.devices), ("num_nodes", config.num_nodes))}  # fmt: skip
        problems += find_contradictions(job, **fixed, global_batch_size=config.global_batch_size)
    if problems:
        raise SubmitError(Problem(_source_of(p.option, given, config), p.message) for p in problems)
    return job


def with_config(given: Mapping[str, str | None], config: RunConfig) -> dict[str, str | None]:
    """SLURM's options as texts: those of the command line, then those of the config. Pure."""
    texts: dict[str, str | None] = {}
    for field in dataclasses.fields(config.slurm):
        value = getattr(config.slurm, field.name)
        texts[field.name.replace("_", "-")] = None if value is None else str(value)
    return {**texts, **{option: text for option, text in given.items() if text is not None}}


def _source_of(option: str, given: Mapping[str, str | None], config: RunConfig) -> str:
    """Where an option was set, for a message."""
    key = option.replace("-", "_")
    in_config = given.get(option) is None and getattr(config.slurm, key, None) is not None
    return f"slurm.{key}" if in_config else f"--{option}"


def make_folder(submission: Submission) -> None:
    """Create the submission's folder, private, with the config that the job reads.

    Raises:
        SubmitError: the disk is full or read-only.
    """
    _export_secrets(submission.config)
    try:
        submission.place.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        submission.folder.mkdir(mode=0o700, parents=True)
        write_file(submission.folder / "config.yaml", submission.config.to_yaml(os.environ))
    except OSError as error:
        remove_folder(submission)
        message = f"{submission.folder} cannot be created: {error.strerror or error}"
        raise SubmitError(
            [Problem("runs_dir", f"{message}; choose a folder with space where you may write")]
        ) from error


def _export_secrets(config: RunConfig) -> None:
    """Set the config's secrets as variables, which sbatch and the job's process inherit; no file contains them."""
    for name, value in references(config.to_dict(), os.environ).items():
        if os.environ.setdefault(name, value) != value:
            raise SubmitError([Problem(name, "two values are given for one secret, which a job gets by this variable; "
                                       "unset it, and give all members of a sweep the same")])  # fmt: skip


def remove_folder(submission: Submission) -> None:
    """Remove what `make_folder` created."""
    shutil.rmtree(submission.folder, ignore_errors=True)
    remove_empty_folders(submission.folder.parent, submission.place.path, submission.place.path.parent)


def remove_empty_folders(*folders: Path) -> None:
    """Remove those that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
