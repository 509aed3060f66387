"""From a config and a job's options to what is queued: one frozen record, for the dry run and for the real one."""

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
from launcher.runs.selection import RunPlace, find_run
from launcher.runs.submission_record import FOLDER
from slurm.check import find_contradictions, ranks_per_node
from slurm.handed_on import names_to_hand_on
from slurm.job import JobRequestError, OptionProblem, SlurmJob, read_job


@dataclass(frozen=True, slots=True)
class AttemptTerms:
    """What is agreed for every attempt of a job.

    Attributes:
        interface: of the network; None for the one by which the nodes reach each other.
        max_fruitless: attempts in a row without a saved step, after which the job is given up.
        join_timeout: seconds that the nodes wait for each other.
    """

    interface: str | None = None
    max_fruitless: int = 3
    join_timeout: float = 600.0

    def problems(self) -> list[OptionProblem]:
        """What no job can be given."""
        found: list[OptionProblem] = []
        if self.max_fruitless < 1:
            found.append(OptionProblem("max-fruitless", f"given {self.max_fruitless}; expected at least 1"))
        if not 0 < self.join_timeout < math.inf:
            message = f"given {self.join_timeout:g}; expected seconds, more than 0"
            found.append(OptionProblem("join-timeout", message))
        return found


@dataclass(frozen=True)
class Submission:
    """A run that is to be queued.

    Attributes:
        config: of the run, with everything that the job fixes: name, folder of the runs, ranks and nodes.
        job: what SLURM is asked for.
        place: the run's directory.
        folder: of this submission, in the run's directory; nothing is made yet.
        resume_from: checkpoint to begin with.
        terms: of its attempts.
    """

    config: RunConfig
    job: SlurmJob
    place: RunPlace
    folder: Path
    resume_from: Path | None
    terms: AttemptTerms = AttemptTerms()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.place.path.name

    @property
    def command(self) -> tuple[str, ...]:
        """What trains on each node; how to start ranks is added there."""
        return module_command("launcher", "fit", "--config", str(self.folder / "config.yaml"))


def terms_of(options: argparse.Namespace) -> AttemptTerms:
    """What `launcher submit` was asked for."""
    return AttemptTerms(options.interface, options.max_fruitless, options.join_timeout)


def prepare(
    config: RunConfig,
    given: Mapping[str, str | None],
    env: Mapping[str, str],
    export: Sequence[str] = (),
    terms: AttemptTerms = AttemptTerms(),
) -> Submission:
    """Check everything and decide where the run goes; makes nothing.

    Args:
        config: what the user asked for.
        given: SLURM's options, by sbatch's names; they win over the config's `slurm`.
        env: the submitting shell's variables; their values are not looked at.
        export: names of more of them to hand on.
        terms: of the job's attempts.

    Raises:
        SubmitError: lists every option that is wrong or contradicts the config.
        RunDirectoryError, ResumeError: see `launcher.runs.selection.find_run`.
    """
    problems: list[OptionProblem] = []
    missing = [name for name in export if name not in env]
    problems += [OptionProblem("export-env", f"given {name!r}, which is not set here") for name in missing]
    problems += terms.problems()
    if any(letter in config.runs_dir for letter in "%\n\r"):
        problems.append(
            OptionProblem("runs_dir", f"given {config.runs_dir!r}; sbatch takes '%' and line ends otherwise")
        )
    job = SlurmJob("unnamed")
    try:
        variables = names_to_hand_on(env, [*export, *references(config.to_dict(), env)])
        job = read_job("unnamed", with_config(given, config), variables)
    except JobRequestError as error:
        problems += error.problems
    else:
        fixed = {key: value if isinstance(value, int) else None
                 for key, value in (("devices", config.devices), ("num_nodes", config.num_nodes))}  # fmt: skip
        problems += find_contradictions(job, **fixed, global_batch_size=config.global_batch_size)
    if problems:
        raise SubmitError(Problem(_where(p.option, given, config), p.message) for p in problems)
    place = find_run(config)
    devices = config.devices if isinstance(config.devices, int) else None
    own = dataclasses.replace(
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
        config=own,
        job=dataclasses.replace(job, name=place.path.name),
        place=place,
        folder=place.path / FOLDER / str(number),
        resume_from=None if config.resume in ("none", "auto") else place.resume_from,
        terms=terms,
    )


def with_config(given: Mapping[str, str | None], config: RunConfig) -> dict[str, str | None]:
    """SLURM's options as texts: what the flags say, else what the config says. Pure."""
    texts: dict[str, str | None] = {}
    for field in dataclasses.fields(config.slurm):
        value = getattr(config.slurm, field.name)
        texts[field.name.replace("_", "-")] = None if value is None else str(value)
    return {**texts, **{option: text for option, text in given.items() if text is not None}}


def _where(option: str, given: Mapping[str, str | None], config: RunConfig) -> str:
    """Where an option was said, for a message."""
    key = option.replace("-", "_")
    in_config = given.get(option) is None and getattr(config.slurm, key, None) is not None
    return f"slurm.{key}" if in_config else f"--{option}"


def make_folder(submission: Submission) -> None:
    """Make the submission's folder, private, with the config that the job reads.

    Raises:
        SubmitError: the disk is full or read-only.
    """
    _hand_on_secrets(submission.config)
    try:
        submission.place.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        submission.folder.mkdir(mode=0o700, parents=True)
        write_file(submission.folder / "config.yaml", submission.config.to_yaml(os.environ))
    except OSError as error:
        remove_folder(submission)
        where = f"{submission.folder} cannot be made: {error.strerror or error}"
        raise SubmitError([Problem("runs_dir", f"{where}; choose a folder with space where you may write")]) from error


def _hand_on_secrets(config: RunConfig) -> None:
    """Put the config's secrets where sbatch and the job's process find them: in variables, never in a file."""
    for name, value in references(config.to_dict(), os.environ).items():
        if os.environ.setdefault(name, value) != value:
            raise SubmitError([Problem(name, "two values are given for one secret, which a job gets by this variable; "
                                       "unset it, and give all members of a sweep the same")])  # fmt: skip


def remove_folder(submission: Submission) -> None:
    """Take back what a submission made that was not queued."""
    shutil.rmtree(submission.folder, ignore_errors=True)
    for folder in (submission.folder.parent, submission.place.path, submission.place.path.parent):
        # With something in it, it stays.
        with contextlib.suppress(OSError):
            folder.rmdir()
