"""Runs on a real SLURM, two nodes with two ranks each: preempted, at the time limit, requeued, without network.

Each is compared, sample by sample and loss by loss, with an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import slurm_faults as faults
from tests.support.runs import PERSISTENT, events_of, read_trace
from tests.support.slurm_cluster import NODES, Cluster
from tests.support.slurm_jobs import Job, set_pace, submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = ("--model", "tests.support.slurm_paced.PacedToy", *PERSISTENT,
         "--global_batch_size", "8", "--trainer.max_epochs", "3", "--checkpoint.every_n_steps", "5")  # fmt: skip
STEPS = 24
# Seconds; longer than any step takes.
_FOR_EVER = "100000"
Curve = dict[int, list[tuple[int, list[int], float]]]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The undisturbed run."""
    job = submit(cluster, tmp_path_factory.mktemp("uninterrupted"), "uninterrupted", *MODEL)
    assert job.wait_for_end() == "COMPLETED", job.collect_output()
    return job


@pytest.fixture
def paced(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A run that is held in a step in the middle of its second epoch; the parameter is a strategy."""
    pace = tmp_path / "pace"
    arguments = (
        "--partition",
        "low",
        "--signal-delay",
        "60",
        # On a node that lost the network, SLURM may end tasks of the new attempt together with the old ones.
        "--join-timeout",
        "30",
        "--time",
        "10",
        "--strategy",
        getattr(request, "param", "ddp"),
    )
    set_pace(pace, "0.3")
    job = submit(cluster, tmp_path, "paced", *MODEL, *arguments, env={"PACE": str(pace)})
    try:
        job.wait_for_step(9)
        set_pace(pace, _FOR_EVER)
        yield job
    finally:
        cluster.command("scancel", job.job_id)
        job.wait_for("the end", lambda: job.state in ("COMPLETED", "FAILED", "CANCELLED"))


def _wait_for_warning(job: Job) -> None:
    """Wait until the ranks have the signal to save, then run at full speed."""
    job.wait_for("the warning", lambda: "saving at the next step boundary" in job.rank_log(0))
    (job.cwd / "pace").unlink()


def _wait_for_requeue(job: Job) -> None:
    """Wait until SLURM starts the job again."""
    job.wait_for("the requeue", lambda: int(job.cluster.job_field(job.job_id, "Restarts")) == 1)


def _curve(job: Job) -> Curve:
    return {rank: read_trace(job.trace, rank) for rank in range(4)}


def _last_of_each_step(job: Job) -> Curve:
    """Samples and losses of the last execution of each step."""
    return {rank: [entry for _, entry in sorted({entry[0]: entry for entry in trace}.items())]
            for rank, trace in _curve(job).items()}  # fmt: skip


def _nearly(curve: Curve) -> Any:
    """The curve within the accuracy of sums in another order."""
    return {
        rank: [(step, samples, pytest.approx(loss, rel=1e-3)) for step, samples, loss in trace]
        for rank, trace in curve.items()
    }


def _resumed_in_order(job: Job, uninterrupted: Job, *, exact: bool = True) -> None:
    """The run finished; it was stopped once, saved, and lost no step; its loss curve equals the undisturbed run's."""
    assert job.wait_for_end() == "COMPLETED", job.collect_output()
    assert _curve(job) == (_curve(uninterrupted) if exact else _nearly(_curve(uninterrupted))), job.collect_output()
    first, second = events_of(job.run, "run_started")
    assert first["wandb_id"] == second["wandb_id"]
    (resumed,) = events_of(job.run, "resumed")
    assert resumed["checkpoint"].endswith("/paced/checkpoints/last.ckpt")
    stopped = {event["step"] for event in events_of(job.run, "interrupted")}
    assert len(stopped) == 1, "all four ranks stopped at the same step"


def test_two_nodes_train_together(uninterrupted: Job) -> None:
    (started,) = events_of(uninterrupted.run, "run_started")
    assert started["name"] == "uninterrupted"
    assert {event["step"] for event in events_of(uninterrupted.run, "finished")} == {STEPS}
    samples = [
        index
        for rank in range(4)
        for step, batch, _ in read_trace(uninterrupted.trace, rank)
        if step < 8
        for index in batch
    ]
    assert sorted(samples) == list(range(64)), "each sample once an epoch, on one of four ranks"
    plan = events_of(uninterrupted.run, "planned")[0]["plan"]
    assert (plan["world_size"], plan["num_nodes"], sorted(plan["hosts"])) == (4, 2, list(NODES))


def test_a_preempted_job_saves_and_resumes_as_if_uninterrupted(uninterrupted: Job, paced: Job) -> None:
    faults.preempt(paced)
    _wait_for_warning(paced)
    _resumed_in_order(paced, uninterrupted)
    output = "".join(file.read_text() for file in paced.run.glob("submissions/1/*_0_log.err"))
    assert "the job is queued again" in output


def test_a_job_at_its_time_limit_saves_and_resumes(uninterrupted: Job, paced: Job) -> None:
    faults.run_out_of_time(paced)
    _wait_for_warning(paced)
    _wait_for_requeue(paced)
    faults.give_time(paced)
    _resumed_in_order(paced, uninterrupted)


@pytest.mark.parametrize("paced", ["deepspeed_stage_2"], indirect=True)
def test_a_manually_requeued_job_saves_and_resumes(uninterrupted: Job, paced: Job) -> None:
    """Under DeepSpeed on both nodes, whose losses equal DDP's except for the last bits."""
    # Restarted daemons do not affect the job.
    faults.restart_slurmd(paced)
    faults.restart_slurmctld(paced)
    faults.requeue(paced)
    _wait_for_warning(paced)
    _resumed_in_order(paced, uninterrupted, exact=False)
    assert (paced.run / "checkpoints" / "last.ckpt" / "checkpoint").is_dir()


def test_a_job_whose_second_node_does_not_return_is_requeued(uninterrupted: Job, paced: Job) -> None:
    cluster = paced.cluster
    cluster.hold_tasks(NODES[1])
    try:
        faults.requeue(paced)
        _wait_for_warning(paced)
        paced.wait_for("the second requeue", lambda: int(cluster.job_field(paced.job_id, "Restarts")) >= 2)
    finally:
        cluster.let_tasks_begin(NODES[1])
    _resumed_in_order(paced, uninterrupted)
    output = "".join(file.read_text() for file in paced.run.glob("submissions/1/*_0_log.err"))
    assert "node 1 of 2 did not come within 30 s" in output
    assert "node 1 never came; the job is queued again" in output


def test_a_job_whose_second_node_is_missing_ends(cluster: Cluster, tmp_path: Path) -> None:
    cluster.hold_tasks(NODES[1])
    try:
        job = submit(cluster, tmp_path, "alone", *MODEL, "--time", "10", "--join-timeout", "2")
        assert job.wait_for_end() == "FAILED", job.collect_output()
    finally:
        cluster.let_tasks_begin(NODES[1])
    output = "".join(file.read_text() for file in job.run.glob("submissions/1/*_0_log.err"))
    assert "error: node 1 of 2 did not come within 2 s" in output
    assert int(cluster.job_field(job.job_id, "Restarts")) == 0


def test_a_run_whose_node_loses_the_network_continues_from_its_last_checkpoint(uninterrupted: Job, paced: Job) -> None:
    faults.unplug(paced)
    try:
        (paced.cwd / "pace").unlink()
        _wait_for_requeue(paced)
    finally:
        faults.plug_in(paced)
    assert paced.wait_for_end() == "COMPLETED", paced.collect_output()
    assert _last_of_each_step(paced) == _curve(uninterrupted), paced.collect_output()
    (resumed,) = events_of(paced.run, "resumed")
    assert "/paced/checkpoints/" in resumed["checkpoint"]
