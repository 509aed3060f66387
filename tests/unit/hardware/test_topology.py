"""`launcher.hardware.topology`: who this process is, from a mapping."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from launcher.hardware.rank_count import check_ranks
from launcher.hardware.topology import Topology

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "abc",
}
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}


def without(*names: str) -> dict[str, str]:
    return {k: v for k, v in TORCHRUN.items() if k not in names}


def test_without_variables_it_is_a_single_rank() -> None:
    # A shell may export an address without having made ranks.
    place = Topology.from_env({"MASTER_ADDR": "x", "MASTER_PORT": "1", "PATH": "/bin"}, "laptop")
    assert place == Topology(0, 1, 0, 1, 0, "laptop", "single")
    assert place.num_nodes == 1


def test_all_values_are_read_from_torchrun() -> None:
    place = Topology.from_env(TORCHRUN, "node1")
    assert place == Topology(
        rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, host="node1", source="torchrun",
        master_addr="node0", master_port=29511, agent_store=True, restart_count=2, run_id="abc",
    )  # fmt: skip
    assert place.num_nodes == 2


def test_the_real_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Topology.from_env({}, "h").source == "single"


def test_ranks_of_an_older_torchrun_serve_their_own_store() -> None:
    place = Topology.from_env(without("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK"), "h")
    assert (place.agent_store, place.restart_count, place.node_rank) == (False, 0, 0)


def test_torchrun_inside_a_slurm_step_has_priority() -> None:
    assert Topology.from_env({**SLURM, **TORCHRUN}, "h").source == "torchrun"


@pytest.mark.parametrize("missing", NEEDED)
def test_missing_variables_are_listed(missing: str) -> None:
    with pytest.raises(TopologyError, match=f"{missing} missing"):
        Topology.from_env(without(missing), "h")


def test_rank_alone_lists_all_missing_variables_with_advice() -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.from_env({"RANK": "0"}, "h")
    assert str(caught.value).startswith("RANK=0 set, but WORLD_SIZE, LOCAL_RANK")
    assert "unset RANK " in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_empty_variable_is_a_missing_one() -> None:
    with pytest.raises(TopologyError, match="WORLD_SIZE missing"):
        Topology.from_env({**TORCHRUN, "WORLD_SIZE": ""}, "h")


def test_only_empty_variables_are_reported_as_no_value() -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.from_env({"RANK": ""}, "h")
    assert str(caught.value).startswith("no value set, but RANK, WORLD_SIZE")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RANK": "8"}, "RANK=8 must be below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 exceeds WORLD_SIZE=8"),
        ({"WORLD_SIZE": "0"}, "must be below WORLD_SIZE=0"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not an integer"),
        ({"RANK": "-1"}, "RANK='-1' is not an integer"),
        ({"GROUP_RANK": "x"}, "GROUP_RANK='x' is not an integer"),
        ({"TORCHELASTIC_RESTART_COUNT": "1.5"}, "TORCHELASTIC_RESTART_COUNT='1.5' is not an integer"),
    ],
)
def test_contradictions_are_named_with_their_values(change: dict[str, str], text: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.from_env({**TORCHRUN, **change}, "h")
    assert text in str(caught.value)


def test_all_contradictions_are_reported_at_once() -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.from_env({**TORCHRUN, "RANK": "9", "LOCAL_RANK": "7", "MASTER_PORT": "70000"}, "h")
    assert all(name in str(caught.value) for name in ("RANK=9", "LOCAL_RANK=7", "MASTER_PORT=70000"))


def test_one_slurm_task_is_one_process_of_that_job() -> None:
    place = Topology.from_env(SLURM, "n1")
    assert (place.source, place.world_size, place.run_id, place.master_addr) == ("slurm", 1, "4711", None)


def test_a_job_that_slurm_requeued_counts_as_restarted() -> None:
    assert Topology.from_env({**SLURM, "SLURM_RESTART_COUNT": "2"}, "n1").restart_count == 2


def test_ranks_that_srun_started_are_rejected_with_the_right_command() -> None:
    with pytest.raises(TopologyError, match="srun started 4 tasks") as caught:
        Topology.from_env({**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "n1")
    assert "srun --ntasks-per-node=1 python -m launcher" in str(caught.value)


def test_half_set_slurm_variables_are_a_topology_error() -> None:
    with pytest.raises(TopologyError, match="SLURM_PROCID='x'"):
        Topology.from_env({**SLURM, "SLURM_PROCID": "x"}, "n1")


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_every_place_that_torchrun_can_give_is_read_back(nodes: int, local: int, data: st.DataObject) -> None:
    node, place_in_node = data.draw(st.integers(0, nodes - 1)), data.draw(st.integers(0, local - 1))
    rank = node * local + place_in_node
    numbers = {"RANK": rank, "WORLD_SIZE": nodes * local, "LOCAL_RANK": place_in_node, "LOCAL_WORLD_SIZE": local,
               "GROUP_RANK": node, "MASTER_PORT": 29500}  # fmt: skip
    place = Topology.from_env({"MASTER_ADDR": "a", **{k: str(v) for k, v in numbers.items()}}, "h")
    assert (place.rank, place.world_size, place.local_rank, place.node_rank) == (
        rank,
        nodes * local,
        place_in_node,
        node,
    )
    assert place.num_nodes == nodes


@settings(deadline=None)
@given(st.sets(st.sampled_from(NEEDED), min_size=1, max_size=len(NEEDED) - 1))
def test_exactly_the_missing_variables_are_listed(given_names: set[str]) -> None:
    env = {name: TORCHRUN[name] for name in given_names}
    if given_names <= {"MASTER_ADDR", "MASTER_PORT"}:
        assert Topology.from_env(env, "h").source == "single"
        return
    with pytest.raises(TopologyError) as caught:
        Topology.from_env(env, "h")
    missing = str(caught.value).partition("but ")[2].partition(" missing")[0].split(", ")
    assert missing == [name for name in NEEDED if name not in given_names]


def test_a_process_that_starts_no_ranks_lists_programs_that_do() -> None:
    with pytest.raises(TopologyError) as caught:
        check_ranks(RunConfig(devices=2), Topology.single("h"))
    assert "devices: 2 was requested, but this process is one rank" in str(caught.value)
    assert all(way in str(caught.value) for way in ("TrainingCoordinator(devices=2)", "fit --devices 2", "torchrun"))
    check_ranks(RunConfig(devices=1), Topology.single("h"))
    with pytest.raises(TopologyError, match="torchrun started 4 ranks on this node"):
        check_ranks(RunConfig(devices=2), Topology.from_env(TORCHRUN, "h"))
