"""`launcher doctor --nodes 2` on the real cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import launcher, run
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import PATIENCE, REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_nodes_multiply_reduce_and_compare_clocks(cluster: Cluster, tmp_path: Path) -> None:
    arguments = (
        "--nodes",
        "2",
        "--nproc-per-node",
        "2",
        "--cpus-per-task",
        "4",
        "--partition",
        "high",
        "--cpu",
        "--json",
    )
    env = {**cluster.env, "PYTHONPATH": str(REPOSITORY)}
    ended = run(launcher("doctor", *arguments), tmp_path, env=env, timeout=2 * PATIENCE)
    findings = json.loads(ended.output[ended.output.index("[\n") :])
    passed = {(f["name"], f["found"]) for f in findings if f["status"] == "ok"}
    assert ("accounting", "sacct answers") in passed, ended.output
    assert any(
        (name == "SLURM" and found.startswith("22.")) or found.startswith("low: 2 nodes") for name, found in passed
    )
    by_name = {f["name"]: f for f in findings}
    assert by_name["ranks"]["status"] == "ok", f"{ended.output}\n{cluster.log_tails()}"
    assert by_name["ranks"]["found"].startswith("4 on n1, n2 (")
    assert "over 4 ranks" in by_name["all-reduce"]["found"]
    assert "between neighbours of 2 nodes" in by_name["exchange"]["found"]
    # The nodes share one clock: the measured offset is the uncertainty of the round trip.
    assert (by_name["clock"]["status"], "from the node of rank 0" in by_name["clock"]["found"]) == ("ok", True)
    # The checks ran on the nodes, which have no GPU.
    assert any(f["name"] == "device" and f["found"].startswith("n1, n2: ") for f in findings)
    assert list(tmp_path.iterdir()) == [], "the folder of the results is gone"
