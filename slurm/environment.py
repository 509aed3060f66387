"""Records of the variables that SLURM sets for a task or an allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# From slurm.h: larger step numbers are batch scripts, interactive shells and other special steps.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Libraries that find these variables take their process for one of srun's tasks.
TASK_VARIABLES = frozenset({"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"})


class SlurmEnvironmentError(ValueError):
    """SLURM's variables are incomplete or not numbers."""


@dataclass(frozen=True, slots=True)
class SlurmTask:
    """One task of a job step. `task` and `node` are ranks in the step; `tasks` and `nodes` are their numbers.

    Attributes:
        step: the step's number, as text; None in a batch script or a shell.
        member: ARRAY_INDEX of a member of a job array; None for any other job.
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
        """The job's id for scontrol and scancel; the job number of an array member may be that of the array."""
        return self.member or self.job_id

    @property
    def has_one_task_per_node(self) -> bool:
        """Whether the step has several nodes with one task on each."""
        return self.tasks == self.nodes > 1


@dataclass(frozen=True, slots=True)
class SlurmAllocation:
    """Nodes that are allocated to a shell or a batch script, which can start steps on them.

    Attributes:
        nodelist: names in SLURM's notation; empty if SLURM does not set them.
        cpus_per_task: the allocation's option, which `srun` does not inherit.
    """

    job_id: str
    nodes: int
    nodelist: str
    cpus_per_task: str | None


def read_slurm_allocation(env: Mapping[str, str]) -> SlurmAllocation | None:
    """The allocation that this process runs in; None without one, and for tasks that `srun` started."""
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
    """The task that `srun` started as this process; None outside a job step.

    A batch script counts as a step with one task.

    Raises:
        SlurmEnvironmentError: lists every variable that is missing or not a number.
    """
    if "SLURM_JOB_ID" not in env or "SLURM_PROCID" not in env:
        return None
    # The batch step is one process, but inherits the job's SLURM_NTASKS.
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
        raise SlurmEnvironmentError(
            f"SLURM_JOB_ID is set, but {', '.join(wrong)}; expected whole numbers; start the task with srun"
        )
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
