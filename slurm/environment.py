"""The variables that SLURM gives a task, read once into a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class SlurmEnvironmentError(ValueError):
    """SLURM's variables are half set or no numbers."""


@dataclass(frozen=True, slots=True)
class SlurmTask:
    """One task of a job step.

    Attributes:
        job_id: the job's number, as text.
        task: rank of this task within the step.
        tasks: number of tasks in the step.
        node: rank of this node within the step.
        restart_count: how often SLURM requeued the job.
    """

    job_id: str
    task: int
    tasks: int
    node: int
    restart_count: int


def read_slurm_task(env: Mapping[str, str]) -> SlurmTask | None:
    """The task that `srun` started this process as; None outside of a job step.

    A batch script or `salloc` shell has SLURM_JOB_ID but no SLURM_PROCID of its own making: it counts as a step of one.

    Raises:
        SlurmEnvironmentError: a variable is missing or no number; names all of them.
    """
    if "SLURM_JOB_ID" not in env or "SLURM_PROCID" not in env:
        return None
    # The batch step inherits the job's SLURM_NTASKS though it is one process.
    step_is_batch = "SLURM_STEP_ID" not in env
    values: dict[str, int] = {}
    wrong: list[str] = []
    names = {"SLURM_PROCID": None, "SLURM_STEP_NUM_TASKS": "1" if step_is_batch else env.get("SLURM_NTASKS"),
             "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "0"}  # fmt: skip
    for name, default in names.items():
        text = env.get(name, default)
        if text is None or not text.isdecimal():
            wrong.append(f"{name}={'not set' if text is None else repr(text)}")
        else:
            values[name] = int(text)
    if wrong:
        raise SlurmEnvironmentError(f"SLURM_JOB_ID is set, but {', '.join(wrong)}; expected whole numbers")
    return SlurmTask(
        job_id=env["SLURM_JOB_ID"],
        task=values["SLURM_PROCID"],
        tasks=values["SLURM_STEP_NUM_TASKS"],
        node=values["SLURM_NODEID"],
        restart_count=values["SLURM_RESTART_COUNT"],
    )
