"""Which of SLURM's tasks or MPI's processes a script is."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from launcher.agent.external_ranks import outside_rank
from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from launcher.hardware.topology import Topology


def task(rank: int, nodes: int = 2, on_each: int = 1, **more: Any) -> dict[str, str]:
    """What `srun --nodes=N --ntasks-per-node=M python script.py` sets in a task."""
    values = {
        "SLURM_JOB_ID": 123456, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": nodes * on_each, "SLURM_STEP_ID": 0,
        "SLURM_NTASKS_PER_NODE": on_each, "SLURM_STEP_NUM_TASKS": nodes * on_each, "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NODELIST": "localhost,n[2-9]", "SLURM_NODEID": rank // on_each, "SLURM_LOCALID": rank % on_each,
        "SLURM_PROCID": rank, **more,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items() if value is not None}


CPU = RunConfig(accelerator="cpu")


@pytest.mark.parametrize(("nodes", "on_each"), [(2, 1), (1, 2), (2, 4), (3, 2)])
def test_each_task_is_the_rank_that_lightning_takes_it_for(nodes: int, on_each: int) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    places: list[Topology] = []
    for rank in range(nodes * on_each):
        env = task(rank, nodes, on_each)
        found = outside_rank(CPU, env)
        assert found is not None
        place = Topology.from_env({**env, **found}, "here")
        places.append(place)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.delenv("MASTER_PORT", raising=False)
            theirs = SLURMEnvironment()
            assert theirs.detect()
            assert (place.rank, place.world_size) == (theirs.global_rank(), theirs.world_size())
            assert (place.local_rank, place.node_rank) == (theirs.local_rank(), theirs.node_rank())
            assert place.master_port == theirs.main_port
    assert {place.local_world_size for place in places} == {on_each}
    assert {place.master_addr for place in places} == {"127.0.0.1" if nodes == 1 else "localhost"}


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_tasks_of_an_interactive_job_are_left_alone_as_by_lightning(name: str) -> None:
    assert outside_rank(CPU, task(0, SLURM_JOB_NAME=name)) is None


@pytest.mark.parametrize(
    "env",
    [{}, {"SLURM_JOB_ID": "1"}, task(0, 1, 1), {**task(0), "RANK": "0"},
     {**task(0), "LOCAL_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "1"}],
    ids=["none", "batch script", "one task", "torchrun in it", "torchrun's local rank", "one process"],
)  # fmt: skip
def test_a_process_that_is_none_of_several_is_no_rank(env: dict[str, str]) -> None:
    assert outside_rank(CPU, env) is None


def test_a_batch_script_that_asked_for_tasks_is_one_process() -> None:
    # Lightning waits for ever there for tasks that nobody started.
    assert outside_rank(CPU, task(0, SLURM_STEP_ID=None, SLURM_STEP_NUM_TASKS=None, SLURM_STEP_NUM_NODES=None)) is None


def test_address_and_port_are_the_users_if_they_are_set() -> None:
    found = outside_rank(CPU, task(1, MASTER_ADDR="10.0.0.1", MASTER_PORT=29501))
    assert found is not None
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29501")


def test_steps_of_one_job_that_run_at_once_have_ports_of_their_own() -> None:
    ports = {(outside_rank(CPU, task(0, 1, 2, SLURM_STEP_ID=step)) or {})["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20
    assert all(15000 <= int(port) < 25000 for port in ports)


@pytest.mark.parametrize(
    ("config", "env", "says"),
    [
        (RunConfig(devices=2), task(0), "devices is 2, but srun started 1 task on each node"),
        (RunConfig(accelerator="cpu", num_nodes=3), task(0), "num_nodes is 3, but srun started tasks on 2"),
        (CPU, task(0, SLURM_STEP_NODELIST="no-such-node.invalid,n2"), "set MASTER_ADDR to its address"),
        (CPU, task(0, SLURM_STEP_NODELIST=None), "SLURM does not say which nodes"),
        (CPU, task(1, 2, 2, SLURM_NODEID=1, SLURM_LOCALID=0), "srun --ntasks-per-node=N --distribution=block"),
        (CPU, task(0, SLURM_STEP_NUM_TASKS=3), "expected the same number on each node"),
        (CPU, task(0, SLURM_PROCID="x"), "SLURM_PROCID='x'"),
    ],
)
def test_tasks_that_are_no_ranks_of_the_config_are_refused(config: RunConfig, env: dict[str, str], says: str) -> None:
    with pytest.raises(TopologyError, match=says):
        outside_rank(config, env)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpi_without_mpi4py_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert outside_rank(CPU, {name: "2"}) is None
    with pytest.raises(TopologyError, match="started 2 processes"):
        Topology.from_env({name: "2"}, "here")


def test_processes_of_mpi_with_an_address_need_no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    places = {"RANK": 3, "SIZE": 4, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}
    env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in places.items()}
    found = outside_rank(CPU, {**env, "MASTER_ADDR": "node0", "MASTER_PORT": "29500"})
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
