"""A run to submit: one frozen record, created from a config and a job's options. A dry run shows the same record."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.core.atomic_write import write_file
from launcher.core.errors import Problem, SubmitError
from launcher.core.own_modules import module_command
from launcher.core.secrets import references
from launcher.jobs.sweep import Member
from launcher.runs.selection import RunPlace, find_run
from launcher.runs.submission_record import FOLDER
from slurm.array import ArrayChoice
from slurm.job import (
    JobRequestError,
    OptionProblem,
    SlurmJob,
    count_ranks,
    find_contradictions,
    read_job,
    select_exported_names,
)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The job's options of `launcher submit`.

    Attributes:
        given: SLURM's options, by sbatch's names; they override the config's `slurm`.
        export: names of more variables for the job.
        interface: network interface; None for the one on which the nodes reach each other.
        max_fruitless: attempts in a row without a saved step, after which the job is not requeued.
        join_timeout: seconds that the nodes wait for each other.
    """

    given: Mapping[str, str | None]
    export: tuple[str, ...] = ()
    interface: str | None = None
    max_fruitless: int = 3
    join_timeout: float = 600.0

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> JobOptions:
        """Select them from all options of the command line."""
        given = {
            key.removeprefix("slurm_"): value for key, value in vars(arguments).items() if key.startswith("slurm_")
        }
        return cls(given, tuple(arguments.export_env), arguments.interface, arguments.max_fruitless,
                   arguments.join_timeout)  # fmt: skip

    def find_problems(self, env: Mapping[str, str]) -> list[OptionProblem]:
        """Every value that is not valid in the environment `env`."""
        found = [OptionProblem("export-env", f"given {name!r}, which is not set here; set it, or leave it out")
                 for name in self.export if name not in env]  # fmt: skip
        if self.max_fruitless < 1:
            found.append(OptionProblem("max-fruitless", f"given {self.max_fruitless}; expected at least 1"))
        if not 0 < self.join_timeout < math.inf:
            message = f"given {self.join_timeout:g}; expected seconds, more than 0"
            found.append(OptionProblem("join-timeout", message))
        return found


@dataclass(frozen=True, slots=True)
class ScriptCommand:
    """A plain script to submit: options of `launcher run`, and what follows them on its command line."""

    options: tuple[str, ...]
    script: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """A run to submit.

    `config` includes the settings that the job fixes: name, folder of the runs, ranks and nodes. `folder` is that of
    this submission in the run's directory; `prepare` does not create it. `script` is None for `launcher fit`.
    """

    config: RunConfig
    job: SlurmJob
    place: RunPlace
    folder: Path
    resume_from: Path | None
    options: JobOptions
    script: ScriptCommand | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.place.path.name

    @property
    def command(self) -> tuple[str, ...]:
        """The training command of each node, which adds how to start ranks, and then the script, if there is one."""
        if self.script is not None:
            place = ("--name", self.name, "--runs-dir", str(self.place.path.parent))
            return module_command("launcher", "run", *place, *self.script.options)
        return module_command("launcher", "fit", "--config", str(self.folder / "config.yaml"))


@dataclass(frozen=True)
class SweepSubmission:
    """A sweep to submit.

    Attributes:
        path: the sweep's folder, next to those of its runs.
        choice: the members to run now.
        submissions: of these members, by index.
        folder: for the script, the pickles and the tasks' output; not created yet.
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


def prepare(
    config: RunConfig, options: JobOptions, env: Mapping[str, str], script: ScriptCommand | None = None
) -> Submission:
    """Check everything and choose the run directory; creates nothing. Only names of the variables in `env` are kept.

    With `script`, only name, folder and devices of the config are used.

    Raises:
        SubmitError: lists every option that is wrong or contradicts the config.
        RunDirectoryError, ResumeError: see `launcher.runs.selection.find_run`.
    """
    job = _read_job(config, options, env)
    place = find_run(config)
    fixed = dataclasses.replace(
        config,
        name=place.path.name,
        runs_dir=str(place.path.parent),
        devices=count_ranks(job, _number(config.devices)),
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
        options=options,
        script=script,
    )


def _read_job(config: RunConfig, options: JobOptions, env: Mapping[str, str]) -> SlurmJob:
    problems = options.find_problems(env)
    if any(letter in config.runs_dir for letter in "%\n\r"):
        message = f"given {config.runs_dir!r}; sbatch replaces '%' and breaks at line ends; use another folder"
        problems.append(OptionProblem("runs_dir", message))
    # The command line overrides the config.
    slurm = dataclasses.asdict(config.slurm)
    configured = {name.replace("_", "-"): str(value) for name, value in slurm.items() if value is not None}
    texts = configured | {name: text for name, text in options.given.items() if text is not None}
    job = SlurmJob("unnamed")
    try:
        variables = select_exported_names(env, [*options.export, *references(config.to_dict(), env)])
        job = read_job(job.name, texts, variables)
    except JobRequestError as error:
        problems += error.problems
    else:
        problems += find_contradictions(job, devices=_number(config.devices), num_nodes=_number(config.num_nodes),
                                        global_batch_size=config.global_batch_size)  # fmt: skip

    def source_of(option: str) -> str:
        is_in_config = option in configured and options.given.get(option) is None
        return f"slurm.{option.replace('-', '_')}" if is_in_config else f"--{option}"

    if problems:
        raise SubmitError(Problem(source_of(p.option), p.message) for p in problems)
    return job


def _number(setting: int | str) -> int | None:
    """The number in a setting; None for `auto`."""
    return setting if isinstance(setting, int) else None


def make_folder(submission: Submission) -> None:
    """Create the submission's folder, private, with the config that the job reads."""
    _export_secrets(submission.config)
    submission.place.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    submission.folder.mkdir(mode=0o700, parents=True)
    if submission.script is None:
        write_file(submission.folder / "config.yaml", submission.config.to_yaml(os.environ))


def _export_secrets(config: RunConfig) -> None:
    """Set the config's secrets as variables, which sbatch and the job's process inherit; no file contains them."""
    for name, value in references(config.to_dict(), os.environ).items():
        if os.environ.setdefault(name, value) != value:
            raise SubmitError([Problem(name, "two values are given for one secret, which the job reads from this "
                                       "variable; unset it, and give all members of a sweep one value")])  # fmt: skip


def remove_folder(submission: Submission) -> None:
    """Remove what `make_folder` created."""
    shutil.rmtree(submission.folder, ignore_errors=True)
    remove_empty_folders(submission.folder.parent, submission.place.path, submission.place.path.parent)


def remove_empty_folders(*folders: Path) -> None:
    """Remove these folders if they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
