"""A job array and a manual allocation, on a real SLURM."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import launcher, run
from tests.support.runs import REPOSITORY, TOY, events_of, read_trace
from tests.support.slurm_cluster import NODES, Cluster, wait_until
from tests.support.slurm_jobs import PATIENCE, run_launcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_sweep_is_a_job_array_with_members_that_are_requeued_independently(cluster: Cluster, tmp_path: Path) -> None:
    pace, trace = tmp_path / "pace", tmp_path / "trace"
    pace.write_text("1")
    own = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], "PACE": str(pace), "TRACE": str(trace)}
    output = run_launcher(cluster, tmp_path, "submit", *TOY, "--model", "tests.support.slurm_paced.PacedToy",
                          "--accelerator", "cpu", "--devices", "1", "--cpus-per-task", "4", "--name", "s",
                          "--trainer.max_steps", "16", "--checkpoint.monitor", "loss", "--export-env", "PACE",
                          "--export-env", "TRACE", "--sweep", "model.init_args.lr=0.01,0.05,0.1", "--array", "0,2%1",
                          env=own).output  # fmt: skip
    assert "of 2 jobs is queued" in output
    (array,) = re.findall(r"array (\d+) of", output)

    def members() -> list[dict[str, Any]]:
        return json.loads(run_launcher(cluster, tmp_path, "status", "s", "--json").output)

    def describe() -> str:
        logs = [*tmp_path.glob("runs/s/arrays/*/*_log.*"), *tmp_path.glob("runs/s-*/logs/*.log")]
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs) + cluster.log_tails()

    try:
        # One member at a time: the second waits for the end of the first.
        wait_until("a step", lambda: Path(f"{trace}-0").exists(), PATIENCE)
        cluster.command("scontrol", "requeue", f"{array}_0")
        events = tmp_path / "runs" / "s-0" / "events.jsonl"
        wait_until("the stop", lambda: '"interrupted"' in events.read_text(), PATIENCE)
        pace.unlink()
        ended = ("done", "failed", "cancelled", "ended")
        wait_until("the end", lambda: all(m["run"]["state"] in ended for m in members() if m["run"]), PATIENCE)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{describe()}") from None
    first, left_out, last = members()
    assert [member["run"]["state"] for member in (first, last)] == ["done", "done"], describe()
    assert [member["run"]["attempts"] for member in (first, last)] == [2, 1], describe()
    assert left_out["run"] is None
    assert first["last"] != last["last"]
    # Both have done their 16 steps once; the stopped one has lost none.
    steps = [step for step, _, _ in read_trace(trace)]
    assert sorted(steps) == sorted([*range(16)] * 2), describe()
    ids = [event["wandb_id"] for n in (0, 2) for event in events_of(tmp_path / "runs" / f"s-{n}", "run_started")]
    assert len(ids) == 3
    assert ids[0] == ids[1] != ids[2]


def test_a_job_gets_the_requested_gpus_and_a_torch_without_cuda_is_reported(cluster: Cluster, tmp_path: Path) -> None:
    """The cluster's GPUs are device files that SLURM counts and assigns; torch has no CUDA."""
    own = {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    output = run_launcher(cluster, tmp_path, "submit", *TOY, "--nodes", "1", "--gpus-per-node", "2", "--cpus-per-task",
                          "4", "--name", "g", env=own).output  # fmt: skip
    (job_id,) = re.findall(r"job (\d+) is queued", output)
    assert cluster.job_field(job_id, "TresPerNode") == "gres:gpu:2"
    wait_until("the end", lambda: cluster.job_field(job_id, "JobState") in ("COMPLETED", "FAILED"), PATIENCE)
    folder = tmp_path / "runs" / "g" / "submissions" / "1"
    log = "".join(file.read_text() for file in folder.glob("*_log.*"))
    assert "accelerator 'gpu' was requested, but this machine has only cpu" in log, log
    assert "exit code 2" in log
    status = json.loads(run_launcher(cluster, tmp_path, "status", "g", "--json").output)
    assert status["state"] == "failed"


def test_inside_an_allocation_the_agents_are_started_on_its_nodes(cluster: Cluster, tmp_path: Path) -> None:
    env = {**cluster.env, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    fit = launcher(
        "fit", *TOY, "--accelerator", "cpu", "--nproc-per-node", "2", "--name", "a", "--trainer.max_steps", "4"
    )
    allocate = ["salloc", "--nodes=2", "--cpus-per-task=4", "--ntasks-per-node=1", *fit]
    ended = run(allocate, tmp_path, env=env, timeout=PATIENCE).check()
    assert "has 2 nodes: starting on them through srun" in ended.output
    plan = events_of(tmp_path / "runs" / "a", "planned")[0]["plan"]
    assert (plan["world_size"], plan["num_nodes"], sorted(plan["hosts"])) == (4, 2, list(NODES))
    assert list((tmp_path / "runs").glob(".rendezvous*")) == []

    # With more than one task a node the error has the command to use instead.
    wrong = ["srun", "--nodes=1", "--ntasks=2", "--cpus-per-task=2", sys.executable, "-m", "launcher", "fit", *TOY]
    assert "one task a node" in run(wrong, tmp_path, env=env, timeout=PATIENCE).output
