"""What befalls a job on the cluster of the tests, and what puts the cluster in order again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.support.slurm_cluster import NODES, wait_until
from tests.support.slurm_jobs import Job

# The node that is hurt: the other one has rank zero.
_HURT = NODES[1]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: for tables.
        inflict: does it, to a job that trains.
        heal: puts right what must be right for the job to end; called once it was requeued, or at once if it is not.
        warned: the job hears of it while all ranks still can save: not a step may be lost.
        requeues: the job is expected to start again.
    """

    name: str
    inflict: Callable[[Job], None]
    heal: Callable[[Job], None]
    warned: bool = True
    requeues: bool = True


def preempt(job: Job) -> None:
    """A job of a partition with a higher priority wants both nodes."""
    job.cluster.command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def run_out_of_time(job: Job) -> None:
    """Its limit becomes a minute more than it has run, which is within the minute of warning."""
    hours, minutes, _ = job.cluster.job_field(job.job_id, "RunTime").split(":")
    limit = int(hours) * 60 + int(minutes) + 1
    job.cluster.command("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={limit}")


def give_time(job: Job) -> None:
    """Ten minutes for the next attempt."""
    job.cluster.command("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=10")


def requeue(job: Job) -> None:
    """By hand."""
    job.cluster.command("scontrol", "requeue", job.job_id)


def signal_by_hand(job: Job) -> None:
    """The warning, sent by a person."""
    job.cluster.command("scancel", "--signal=USR2", job.job_id)


def kill_slurmd(job: Job) -> None:
    """A node's daemon dies and stays dead; what it started runs on."""
    job.cluster.kill_daemon(_HURT)


def start_slurmd(job: Job) -> None:
    """It is started again."""
    job.cluster.start_daemon(_HURT)


def restart_slurmd(job: Job) -> None:
    """A node's daemon dies and is started again before the controller misses it."""
    kill_slurmd(job)
    start_slurmd(job)


def restart_slurmctld(job: Job) -> None:
    """The controller dies and is started again."""
    job.cluster.kill_daemon("slurmctld")
    job.cluster.start_daemon("slurmctld")
    wait_until("the controller answers", job.cluster.node_states)


def unplug(job: Job) -> None:
    """A node is cut off the network."""
    job.cluster.unplug(_HURT)


def plug_in(job: Job) -> None:
    """It is connected again."""
    job.cluster.plug_in(_HURT)


def plug_in_late(job: Job) -> None:
    """It is connected again when nothing of the job is left on the other node: nobody there could save with it."""
    try:
        wait_until("the other node is idle", lambda: job.cluster.node_state(NODES[0]) == "idle", 150)
    finally:
        job.cluster.plug_in(_HURT)


def nothing(job: Job) -> None:
    """Nothing is to be put right."""


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
