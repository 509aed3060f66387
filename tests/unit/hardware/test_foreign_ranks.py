"""Ranks that mpirun, jsrun or Kubeflow made: one world, or a refusal; never a training of one rank each."""

from __future__ import annotations

import pytest

from launcher.core.errors import TopologyError
from launcher.hardware.mpi_ranks import as_torchrun_variables
from launcher.hardware.topology import Topology

OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
STARTERS = {
    "mpirun": OPEN_MPI,
    "mpirun_rsh": tuple(name.replace("OMPI", "MV2") for name in OPEN_MPI),
    "jsrun": tuple(name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE") for name in OPEN_MPI),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def made_by(starter: str, rank: int, size: int, local_size: int) -> dict[str, str]:
    values = (rank, size, rank % local_size, local_size)
    return dict(zip(STARTERS[starter], map(str, values), strict=True))


@pytest.mark.parametrize("starter", STARTERS)
def test_with_an_address_the_ranks_form_one_world(starter: str) -> None:
    places = [Topology.from_env({**made_by(starter, rank, 4, 2), **ADDRESS}, "h") for rank in range(4)]
    assert [(p.rank, p.world_size, p.local_rank, p.local_world_size, p.node_rank) for p in places] == [
        (0, 4, 0, 2, 0), (1, 4, 1, 2, 0), (2, 4, 0, 2, 1), (3, 4, 1, 2, 1),
    ]  # fmt: skip
    assert {(p.master_addr, p.master_port, p.agent_store) for p in places} == {("node0", 29500, False)}


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "node0"}, {"MASTER_PORT": "29500"}])
def test_without_an_address_the_ranks_are_rejected_with_advice(starter: str, given: dict[str, str]) -> None:
    with pytest.raises(TopologyError) as refused:
        Topology.from_env({**made_by(starter, 1, 4, 2), **given}, "h")
    message = str(refused.value)
    assert message.startswith(f"{starter} started 4 processes, and ")
    assert all(name in message.split(" not set")[0] for name in set(ADDRESS) - set(given))
    assert "each would train its own model" in message


@pytest.mark.parametrize("starter", STARTERS)
def test_one_process_is_a_single_rank(starter: str) -> None:
    assert Topology.from_env(made_by(starter, 0, 1, 1), "h") == Topology.single("h")


def test_incomplete_variables_and_spread_ranks_are_rejected() -> None:
    with pytest.raises(TopologyError, match=r"its variables do not identify this process .*MPI_LOCALRANKID=None"):
        Topology.from_env({"PMI_RANK": "0", "PMI_SIZE": "2", **ADDRESS}, "h")
    spread = {**made_by("mpirun", 1, 4, 2), "OMPI_COMM_WORLD_LOCAL_RANK": "0", **ADDRESS}
    with pytest.raises(TopologyError, match="--map-by slot"):
        Topology.from_env(spread, "h")


def test_variables_of_srun_and_torchrun_override_those_of_pmi() -> None:
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert Topology.from_env({**slurm, "PMI_RANK": "0", "PMI_SIZE": "2"}, "h").source == "slurm"
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **ADDRESS}
    place = Topology.from_env({**made_by("mpirun", 0, 1, 1), "PET_NNODES": "4", **KUBERNETES, **torchrun}, "h")
    assert (place.rank, place.world_size) == (1, 2)


def test_the_pods_of_kubeflow_are_one_world_of_one_rank_each() -> None:
    pod = {**KUBERNETES, **ADDRESS, "RANK": "1", "WORLD_SIZE": "3"}
    place = Topology.from_env(pod, "h")
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size, place.node_rank) == (1, 3, 0, 1, 1)
    assert as_torchrun_variables(pod) == {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1"}
    with pytest.raises(TopologyError, match="missing; start with torchrun"):
        Topology.from_env({name: value for name, value in pod.items() if name not in KUBERNETES}, "h")


@pytest.mark.parametrize("variables", [{"PET_NNODES": "2"}, {"PET_NNODES": "1:4", "PET_NODE_RANK": "0"}])
def test_torchrun_settings_of_kubeflow_are_not_ignored(variables: dict[str, str]) -> None:
    with pytest.raises(TopologyError, match="start with torchrun, which reads these"):
        Topology.from_env({**KUBERNETES, **variables}, "h")
    with pytest.raises(TopologyError, match="Kubeflow requests 8 ranks in each pod"):
        Topology.from_env({**KUBERNETES, **ADDRESS, "RANK": "0", "WORLD_SIZE": "2", "PET_NPROC_PER_NODE": "8"}, "h")
    assert Topology.from_env({"PET_NNODES": "1"}, "h") == Topology.single("h")
