"""Faults of a job on the test cluster, and how to repair the cluster afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.support.slurm_cluster import NODES, wait_until
from tests.support.slurm_jobs import Job

# The node with the fault; the other one has rank zero.
_HURT = NODES[1]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: for tables.
        inflict: causes the fault in a running job.
        heal: repairs the cluster so that the job can end; called after the requeue, or at once without one.
        warned: whether the job receives a signal in time to save, so that no step may be lost.
        requeues: whether the job should start again.
    """

    name: str
    inflict: Callable[[Job], None]
    heal: Callable[[Job], None]
    warned: bool = True
    requeues: bool = True


def preempt(job: Job) -> None:
    """A job of a partition with higher priority requests both nodes."""
    job.cluster.command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def run_out_of_time(job: Job) -> None:
    """Set the time limit to the elapsed time plus a minute, which triggers the warning."""
    hours, minutes, _ = job.cluster.job_field(job.job_id, "RunTime").split(":")
    limit = int(hours) * 60 + int(minutes) + 1
    job.cluster.command("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={limit}")


def give_time(job: Job) -> None:
    """Set a limit of ten minutes for the next attempt."""
    job.cluster.command("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=10")


def requeue(job: Job) -> None:
    """Requeue the job with scontrol."""
    job.cluster.command("scontrol", "requeue", job.job_id)


def signal_by_hand(job: Job) -> None:
    """Send the warning signal with scancel."""
    job.cluster.command("scancel", "--signal=USR2", job.job_id)


def kill_slurmd(job: Job) -> None:
    """Kill a node's daemon; its tasks keep running."""
    job.cluster.kill_daemon(_HURT)


def start_slurmd(job: Job) -> None:
    """Start the daemon again."""
    job.cluster.start_daemon(_HURT)


def restart_slurmd(job: Job) -> None:
    """Kill a node's daemon and start it again before the controller notices."""
    kill_slurmd(job)
    start_slurmd(job)


def restart_slurmctld(job: Job) -> None:
    """Kill the controller and start it again."""
    job.cluster.kill_daemon("slurmctld")
    job.cluster.start_daemon("slurmctld")
    wait_until("the controller answers", job.cluster.node_states)


def unplug(job: Job) -> None:
    """Disconnect a node from the network."""
    job.cluster.unplug(_HURT)


def plug_in(job: Job) -> None:
    """Connect the node again."""
    job.cluster.plug_in(_HURT)


def plug_in_late(job: Job) -> None:
    """Connect the node again when the job has ended on the other node, so that the ranks cannot save together."""
    try:
        wait_until("the other node is idle", lambda: job.cluster.node_state(NODES[0]) == "idle", 150)
    finally:
        job.cluster.plug_in(_HURT)


def nothing(job: Job) -> None:
    """No repair is needed."""


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("preemption", preempt, nothing),
        Fault("time limit", run_out_of_time, give_time),
        Fault("scontrol requeue", requeue, nothing),
        Fault("scancel --signal=USR2", signal_by_hand, nothing),
        Fault("slurmd killed", kill_slurmd, start_slurmd, warned=False),
        Fault("slurmd restarted", restart_slurmd, nothing, requeues=False),
        Fault("slurmctld restarted", restart_slurmctld, nothing, requeues=False),
        Fault("node cut off", unplug, plug_in, warned=False),
        Fault("node lost", unplug, plug_in_late, warned=False),
    )
}
