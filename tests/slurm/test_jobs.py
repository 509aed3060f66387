"""Runs on a real SLURM, two nodes with two ranks each: preempted, out of time, requeued, cut off the network.

Each is compared, sample by sample and loss by loss, with a run that nothing happened to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.runs import events_of, read_trace
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.jobs import Job, submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# DDP sums the first step after its start in another order than the later ones, which shows in the last bit with more
# than two ranks. Where it looks for unused parameters it does not, and curves can be compared to the last bit.
MODEL = ("--model", "tests.slurm.paced.PacedToy", "--strategy", "ddp_find_unused_parameters_true",
         "--global_batch_size", "8", "--trainer.max_epochs", "3", "--checkpoint.every_n_steps", "5")  # fmt: skip
STEPS = 24
Curve = dict[int, list[tuple[int, list[int], float]]]


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that nothing happens to."""
    job = submit(cluster, tmp_path_factory.mktemp("whole"), "whole", *MODEL)
    assert job.wait_for_end() == "COMPLETED", job.said()
    return job


@pytest.fixture
def paced(cluster: Cluster, tmp_path: Path) -> Iterator[Job]:
    """The same, slow enough to act on, in the middle of its second epoch."""
    pace = tmp_path / "pace"
    _set(pace, "0.3")
    job = submit(cluster, tmp_path, "paced", *MODEL, "--partition", "low", "--signal-delay", "60", "--time", "10",
                 env={"PACE": str(pace)})  # fmt: skip
    try:
        job.wait_for_step(9)
        # SLURM looks at the limits of its jobs every half a minute.
        _set(pace, "4")
        yield job
    finally:
        cluster.command("scancel", job.job_id)
        job.wait_for("the end", lambda: job.state in ("COMPLETED", "FAILED", "CANCELLED"))


def _set(pace: Path, seconds: str) -> None:
    """In one go: the steps read it at any time."""
    written = pace.with_suffix(".new")
    written.write_text(seconds)
    written.replace(pace)


def _wait_for_requeue(job: Job) -> None:
    """Until SLURM starts it again; from there it goes as fast as it can."""
    job.wait_for("the requeue", lambda: int(job.cluster.job_field(job.job_id, "Restarts")) == 1)
    (job.cwd / "pace").unlink()


def _curve(job: Job) -> Curve:
    return {rank: read_trace(job.trace, rank) for rank in range(4)}


def _last_of_each_step(job: Job) -> Curve:
    """What counted: a step that was done again after a failure, as it was done last."""
    return {rank: [entry for _, entry in sorted({entry[0]: entry for entry in trace}.items())]
            for rank, trace in _curve(job).items()}  # fmt: skip


def _resumed_in_order(job: Job, whole: Job) -> None:
    """The run is done; it was stopped once, saved, and lost no step; its loss curve is the uninterrupted run's."""
    assert job.wait_for_end() == "COMPLETED", job.said()
    assert _curve(job) == _curve(whole), job.said()
    first, second = events_of(job.run, "run_started")
    assert first["wandb_id"] == second["wandb_id"]
    (resumed,) = events_of(job.run, "resumed")
    assert resumed["checkpoint"].endswith("/paced/checkpoints/last.ckpt")
    stopped = {event["step"] for event in events_of(job.run, "interrupted")}
    assert len(stopped) == 1, "all four ranks stopped at the same step"


def test_two_nodes_train_as_one(whole: Job) -> None:
    (started,) = events_of(whole.run, "run_started")
    assert started["name"] == "whole"
    assert {event["step"] for event in events_of(whole.run, "finished")} == {STEPS}
    samples = [
        index for rank in range(4) for step, batch, _ in read_trace(whole.trace, rank) if step < 8 for index in batch
    ]
    assert sorted(samples) == list(range(64)), "each sample once an epoch, on one of four ranks"
    plan = events_of(whole.run, "planned")[0]["plan"]
    assert (plan["world_size"], plan["num_nodes"], sorted(plan["hosts"])) == (4, 2, list(NODES))


def test_a_preempted_job_saves_and_goes_on_as_if_nothing_had_happened(cluster: Cluster, whole: Job, paced: Job) -> None:
    words = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.command("sbatch", *words)
    _wait_for_requeue(paced)
    _resumed_in_order(paced, whole)
    said = "".join(file.read_text() for file in paced.run.glob("submissions/1/*_0_log.err"))
    assert "the job is queued again" in said


def test_a_job_whose_time_is_up_saves_and_goes_on(cluster: Cluster, whole: Job, paced: Job) -> None:
    hours, minutes, _ = cluster.job_field(paced.job_id, "RunTime").split(":")
    # One minute more than it has run: that is within the minute of warning.
    limit = int(hours) * 60 + int(minutes) + 1
    cluster.command("scontrol", "update", f"JobId={paced.job_id}", f"TimeLimit={limit}")
    _wait_for_requeue(paced)
    cluster.command("scontrol", "update", f"JobId={paced.job_id}", "TimeLimit=10")
    _resumed_in_order(paced, whole)


def test_a_job_that_is_requeued_by_hand_saves_and_goes_on(cluster: Cluster, whole: Job, paced: Job) -> None:
    cluster.command("scontrol", "requeue", paced.job_id)
    _wait_for_requeue(paced)
    _resumed_in_order(paced, whole)


def test_a_run_whose_node_is_cut_off_goes_on_from_its_last_checkpoint(cluster: Cluster, whole: Job, paced: Job) -> None:
    cluster.unplug("n2")
    try:
        _wait_for_requeue(paced)
    finally:
        cluster.plug_in("n2")
    assert paced.wait_for_end() == "COMPLETED", paced.said()
    assert _last_of_each_step(paced) == _curve(whole), paced.said()
    (resumed,) = events_of(paced.run, "resumed")
    assert "/paced/checkpoints/" in resumed["checkpoint"]
