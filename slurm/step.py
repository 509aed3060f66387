"""The words of an `srun` that runs one task on each of some nodes, now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slurm.job import SlurmJob

# Of `SlurmJob`, what srun takes as it is.
_TAKEN = ("partition", "account", "qos", "reservation", "constraint", "mem", "exclude", "nodelist", "gpus_per_node",
          "cpus_per_task")  # fmt: skip


def step_arguments(job: SlurmJob, command: Sequence[str], wait: int, env: Mapping[str, str]) -> list[str]:
    """`srun` and its options, then the command. Pure.

    Args:
        job: what to ask for; `time` in minutes.
        command: of each task.
        wait: seconds after which srun gives up where the nodes are not free.
        env: says whether this is inside of a job already, which then has the nodes.
    """
    words = ["srun", f"--job-name={job.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1", f"--ntasks={job.nodes}",
             # A node that fails is a result; the others go on.
             "--kill-on-bad-exit=0", "--wait=0", "--quiet"]  # fmt: skip
    inside = "SLURM_JOB_ID" in env
    if not inside:
        words += [f"--immediate={wait}"]
    if job.time is not None:
        words.append(f"--time={job.time}")
    for name in _TAKEN:
        value = getattr(job, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    return [*words, *command]
