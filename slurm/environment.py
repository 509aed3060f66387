"""The variables that SLURM gives a task, read once into a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# slurm.h: from here on step numbers mean the batch script, an interactive shell and the like.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# By these a library takes its process for one of srun's tasks.
OF_THE_TASK = frozenset({"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"})


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
        nodes: number of nodes of the step.
        step: the step's number, as text; None in a batch script or a shell.
        member: ARRAY_INDEX of a member of a job array; None of any other job.
    """

    job_id: str
    task: int
    tasks: int
    node: int
    restart_count: int
    nodes: int = 1
    step: str | None = None
    member: str | None = None

    @property
    def queue_id(self) -> str:
        """By what scontrol and scancel know this job alone: one member's number is its whole array's, too."""
        return self.member or self.job_id

    @property
    def one_a_node(self) -> bool:
        """Whether the step has several tasks, one on each of its nodes."""
        return self.tasks == self.nodes > 1


@dataclass(frozen=True, slots=True)
class SlurmAllocation:
    """Nodes that are allocated to a shell or a batch script, for steps to be started on.

    Attributes:
        job_id: the job's number, as text.
        nodes: number of nodes.
        nodelist: their names in SLURM's notation; empty if not told.
        cpus_per_task: as asked for, which `srun` does not take over; None if not asked for.
    """

    job_id: str
    nodes: int
    nodelist: str
    cpus_per_task: str | None


def read_slurm_allocation(env: Mapping[str, str]) -> SlurmAllocation | None:
    """The allocation around this process, if it is no task that `srun` started in it; None otherwise."""
    if "SLURM_JOB_ID" not in env:
        return None
    step = env.get("SLURM_STEP_ID", "")
    if step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP:
        return None
    nodes = env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or "1"
    return SlurmAllocation(
        job_id=env["SLURM_JOB_ID"],
        nodes=int(nodes) if nodes.isdecimal() else 1,
        nodelist=env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or "",
        cpus_per_task=env.get("SLURM_CPUS_PER_TASK"),
    )


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
             "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "0",
             "SLURM_STEP_NUM_NODES": "1" if step_is_batch else env.get("SLURM_NNODES", "1")}  # fmt: skip
    for name, default in names.items():
        text = env.get(name, default)
        if text is None or not text.isdecimal():
            wrong.append(f"{name}={'not set' if text is None else repr(text)}")
        else:
            values[name] = int(text)
    if wrong:
        raise SlurmEnvironmentError(f"SLURM_JOB_ID is set, but {', '.join(wrong)}; expected whole numbers")
    array, index = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return SlurmTask(
        job_id=env["SLURM_JOB_ID"],
        task=values["SLURM_PROCID"],
        tasks=values["SLURM_STEP_NUM_TASKS"],
        node=values["SLURM_NODEID"],
        restart_count=values["SLURM_RESTART_COUNT"],
        nodes=values["SLURM_STEP_NUM_NODES"],
        step=env.get("SLURM_STEP_ID"),
        member=f"{array}_{index}" if array and index else None,
    )
