"""Numbers of a job that contradict each other or the run, found before anything is queued. Pure."""

from __future__ import annotations

from slurm.job import OptionProblem, SlurmJob


def find_contradictions(
    job: SlurmJob, *, devices: int | None, num_nodes: int | None, global_batch_size: int | None
) -> list[OptionProblem]:
    """Every contradiction, at once.

    Args:
        job: what SLURM is asked for.
        devices: ranks on each node that the run's config fixes, None if it leaves them open.
        num_nodes: nodes that the run's config fixes, None if it leaves them open.
        global_batch_size: samples of one optimizer step, None if the config does not fix them.
    """
    problems: list[OptionProblem] = []
    if job.gpus_per_node is not None and devices not in (None, job.gpus_per_node):
        problems.append(OptionProblem(
            "gpus-per-node", f"given {job.gpus_per_node}, but devices is {devices}; leave out one of them"
        ))  # fmt: skip
    if num_nodes not in (None, job.nodes):
        problems.append(OptionProblem(
            "nodes", f"given {job.nodes}, but num_nodes is {num_nodes}; leave out num_nodes"
        ))  # fmt: skip
    ranks = ranks_per_node(job, devices) * job.nodes
    if global_batch_size is not None and global_batch_size % ranks:
        below = global_batch_size // ranks * ranks
        nearest = " or ".join(str(size) for size in (below, below + ranks) if size)
        problems.append(OptionProblem(
            "nodes", f"{job.nodes} nodes x {ranks // job.nodes} ranks = {ranks} ranks, which global_batch_size "
            f"{global_batch_size} cannot be shared by; the nearest that can: {nearest}"
        ))  # fmt: skip
    # submitit and SLURM look at the clock about once a minute.
    if job.time is not None and job.time * 60 <= job.signal_delay:
        problems.append(OptionProblem(
            "time", f"{job.time} min is no more than the {job.signal_delay} s of --signal-delay that the job has to "
            "save; give more time, or a smaller --signal-delay"
        ))  # fmt: skip
    return problems


def ranks_per_node(job: SlurmJob, devices: int | None) -> int:
    """Ranks on each node: a rank for each GPU, or what the config says, or one."""
    return job.gpus_per_node or devices or 1
