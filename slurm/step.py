"""The arguments of an `srun` that runs one task on each node without queueing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slurm.job import SlurmJob

# Options of `SlurmJob` that srun has too.
_OPTIONS = ("time", "partition", "account", "qos", "reservation", "constraint", "mem", "exclude", "nodelist",
            "gpus_per_node", "cpus_per_task")  # fmt: skip


def make_step_arguments(job: SlurmJob, command: Sequence[str], wait: int, env: Mapping[str, str]) -> list[str]:
    """`srun` and its options, then the command. Outside of a job, srun waits `wait` seconds for free nodes. Pure."""
    arguments = ["srun", f"--job-name={job.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1",
                 f"--ntasks={job.nodes}",
                 # A failed node is a result; the others continue.
                 "--kill-on-bad-exit=0", "--wait=0", "--quiet"]  # fmt: skip
    if "SLURM_JOB_ID" not in env:
        arguments += [f"--immediate={wait}"]
    for name in _OPTIONS:
        value = getattr(job, name)
        if value is not None:
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return [*arguments, *command]
