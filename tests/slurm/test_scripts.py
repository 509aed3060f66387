"""A plain PyTorch script on a real SLURM, two nodes with two ranks each: preempted, it saves itself and continues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import slurm_faults as faults
from tests.support.runs import events_of
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import Job, run_launcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# The first attempt trains until it is asked to save; the second does three more steps.
SCRIPT = """\
import os, signal, sys, time
import torch
import torch.distributed as dist

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
dist.init_process_group("gloo")
first = torch.load("last.pt") if os.path.exists("last.pt") else 0
print(f"{sys.argv[1]} starts at {first} of {dist.get_world_size()} ranks")
step = first
while not first or step < first + 3:
    stop = torch.tensor([len(asked)])
    dist.all_reduce(stop)
    if stop.item():
        if dist.get_rank() == 0:
            torch.save(step, "last.pt")
        dist.barrier()
        print(f"saved {step}")
        sys.exit(0)
    step += 1
    time.sleep(0.05)
print(f"ended at {step}")
dist.destroy_process_group()
"""


def test_a_preempted_script_saves_is_queued_again_and_resumes(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    options = ("--nodes", "2", "--nproc-per-node", "2", "--cpus-per-task", "4", "--partition", "low", "--time", "10",
               "--signal-delay", "60", "--name", "script")  # fmt: skip
    output = run_launcher(cluster, tmp_path, "submit", "--script", "train.py", *options, "--", "mine").output
    found = re.search(r"job (\d+) is queued", output)
    assert found is not None, output
    job = Job(cluster, tmp_path, "script", found[1], tmp_path / "trace")
    try:
        job.wait_for("the first attempt", lambda: "mine starts at 0 of 4 ranks" in job.rank_log(0))
        faults.preempt(job)
        assert job.wait_for_end() == "COMPLETED", job.collect_output()
    finally:
        cluster.command("scancel", job.job_id)
    for rank in range(4):
        (saved,) = re.findall(r"^saved (\d+)$", (job.run / "logs" / f"rank-{rank}.1.log").read_text(), re.MULTILINE)
        log = job.rank_log(rank)
        assert f"mine starts at {saved} of 4 ranks\n" in log
        assert f"ended at {int(saved) + 3}\n" in log
    kinds = [event["kind"] for event in (*events_of(job.run, "run_started"), *events_of(job.run, "finished"))]
    assert kinds == ["run_started", "run_started", "finished"]
    assert '"state": "done"' in run_launcher(cluster, tmp_path, "status", "script", "--json").output
