"""The rank of a script that srun or MPI started."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from launcher.agent.external_ranks import read_external_rank
from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from launcher.hardware.topology import Topology


def task(rank: int, nodes: int = 2, per_node: int = 1, **more: Any) -> dict[str, str]:
    """What `srun --nodes=N --ntasks-per-node=M python script.py` sets in a task."""
    values = {
        "SLURM_JOB_ID": 123456, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": nodes * per_node, "SLURM_STEP_ID": 0,
        "SLURM_NTASKS_PER_NODE": per_node, "SLURM_STEP_NUM_TASKS": nodes * per_node, "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NODELIST": "localhost,n[2-9]", "SLURM_NODEID": rank // per_node, "SLURM_LOCALID": rank % per_node,
        "SLURM_PROCID": rank, **more,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items() if value is not None}


CPU = RunConfig(accelerator="cpu")


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 1), (1, 2), (2, 4), (3, 2)])
def test_each_task_has_the_rank_that_lightning_gives_it(nodes: int, per_node: int) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    topologies: list[Topology] = []
    for rank in range(nodes * per_node):
        env = task(rank, nodes, per_node)
        found = read_external_rank(CPU, env)
        assert found is not None
        topology = Topology.from_env({**env, **found}, "here")
        topologies.append(topology)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.delenv("MASTER_PORT", raising=False)
            lightning = SLURMEnvironment()
            assert lightning.detect()
            assert (topology.rank, topology.world_size) == (lightning.global_rank(), lightning.world_size())
            assert (topology.local_rank, topology.node_rank) == (lightning.local_rank(), lightning.node_rank())
            assert topology.master_port == lightning.main_port
    assert {topology.local_world_size for topology in topologies} == {per_node}
    assert {topology.master_addr for topology in topologies} == {"127.0.0.1" if nodes == 1 else "localhost"}


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_tasks_of_an_interactive_job_are_not_ranks(name: str) -> None:
    assert read_external_rank(CPU, task(0, SLURM_JOB_NAME=name)) is None


@pytest.mark.parametrize(
    "env",
    [{}, {"SLURM_JOB_ID": "1"}, task(0, 1, 1), {**task(0), "RANK": "0"},
     {**task(0), "LOCAL_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}],
    ids=["none", "batch script", "one task", "torchrun in it", "torchrun's local rank", "one process"],
)  # fmt: skip
def test_a_single_process_is_not_a_rank(env: dict[str, str]) -> None:
    assert read_external_rank(CPU, env) is None


def test_a_batch_script_with_ntasks_is_one_process() -> None:
    # Lightning waits there without end for tasks that were never started.
    assert (
        read_external_rank(CPU, task(0, SLURM_STEP_ID=None, SLURM_STEP_NUM_TASKS=None, SLURM_STEP_NUM_NODES=None))
        is None
    )


def test_the_users_address_and_port_are_kept() -> None:
    found = read_external_rank(CPU, task(1, MASTER_ADDR="10.0.0.1", MASTER_PORT=29501))
    assert found is not None
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29501")


def test_concurrent_steps_of_one_job_have_different_ports() -> None:
    ports = {(read_external_rank(CPU, task(0, 1, 2, SLURM_STEP_ID=step)) or {})["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20
    assert all(15000 <= int(port) < 25000 for port in ports)


@pytest.mark.parametrize(
    ("config", "env", "message"),
    [
        (RunConfig(devices=2), task(0), "devices is 2, but srun started 1 task on each node"),
        (RunConfig(accelerator="cpu", num_nodes=3), task(0), "num_nodes is 3, but srun started tasks on 2 nodes"),
        (CPU, task(0, SLURM_STEP_NODELIST="no-such-node.invalid,n2"), "set MASTER_ADDR to its address"),
        (CPU, task(0, SLURM_STEP_NODELIST=None), "SLURM_STEP_NODELIST is not set"),
        (CPU, task(1, 2, 2, SLURM_NODEID=1, SLURM_LOCALID=0), "srun --ntasks-per-node=N --distribution=block"),
        (CPU, task(0, SLURM_STEP_NUM_TASKS=3), "expected the same number of tasks on each node"),
        (CPU, task(0, SLURM_PROCID="x"), "SLURM_PROCID='x'"),
    ],
)
def test_tasks_that_do_not_match_the_config_are_rejected(config: RunConfig, env: dict[str, str], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        read_external_rank(config, env)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpi_processes_without_mpi4py_are_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert read_external_rank(CPU, {name: "2"}) is None
    with pytest.raises(TopologyError, match="started 2 processes"):
        Topology.from_env({name: "2"}, "here")


def test_mpi_processes_with_an_address_need_no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    topologies = {"RANK": 3, "SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}
    env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in topologies.items()}
    found = read_external_rank(CPU, {**env, "MASTER_ADDR": "node0", "MASTER_PORT": "29500"})
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
