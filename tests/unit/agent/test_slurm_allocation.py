"""Starting inside an existing SLURM allocation."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from launcher.agent.slurm_allocation import build_srun_command, nodes_of_step
from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from slurm.environment import SlurmAllocation, read_slurm_allocation

PLAIN = LaunchOptions()
CONFIG = RunConfig()
TWO = SlurmAllocation("7", 2, "n[1-2]", None)
ONE = SlurmAllocation("7", 1, "n1", None)
SHELL = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "4"}


def test_an_allocation_is_found_in_its_shell_and_its_batch_script_but_not_in_a_task() -> None:
    expected = dataclasses.replace(TWO, cpus_per_task="4")
    assert read_slurm_allocation(SHELL) == expected
    assert read_slurm_allocation({**SHELL, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}) == expected
    assert read_slurm_allocation({**SHELL, "SLURM_STEP_ID": "0"}) is None
    assert read_slurm_allocation({}) is None


@pytest.mark.parametrize(
    ("allocation", "num_nodes", "host", "starts"),
    [
        (TWO, "auto", "login", 2),
        (TWO, "auto", "n1", 2),
        (TWO, 2, "n1.cluster.org", 2),
        (TWO, 1, "n1", None),
        (TWO, 1, "login", 1),
        (ONE, "auto", "n1", None),
        (ONE, "auto", "login", 1),
        (dataclasses.replace(ONE, nodelist=""), "auto", "n1", None),
    ],
)
def test_srun_starts_one_agent_on_each_node_unless_this_is_the_only_node(
    allocation: SlurmAllocation, num_nodes: int | str, host: str, starts: int | None
) -> None:
    config = dataclasses.replace(CONFIG, num_nodes=num_nodes)  # type: ignore[arg-type]
    command = build_srun_command(allocation, config, PLAIN, host)
    expected = ("srun", f"--nodes={starts}", f"--ntasks={starts}", "--ntasks-per-node=1", "--export=ALL")
    assert command == (None if starts is None else expected)


def test_the_cpus_of_a_task_are_passed_to_srun() -> None:
    command = build_srun_command(dataclasses.replace(TWO, cpus_per_task="4"), CONFIG, PLAIN, "n1")
    assert command is not None
    assert command[-1] == "--cpus-per-task=4"


def test_explicit_nodes_need_no_srun_and_too_many_nodes_are_an_error() -> None:
    explicit = dataclasses.replace(PLAIN, min_nodes=2, max_nodes=2, endpoint_host="n1", endpoint_port=1)
    assert build_srun_command(TWO, CONFIG, explicit, "n1") is None
    with pytest.raises(TopologyError, match="num_nodes is 3, but job 7 has 2"):
        build_srun_command(TWO, dataclasses.replace(CONFIG, num_nodes=3), PLAIN, "n1")


def test_the_options_stay_unless_a_step_has_several_nodes(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, runs_dir=str(tmp_path / "runs"))
    task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for env in ({}, SHELL, task):
        with nodes_of_step(config, PLAIN, env) as options:
            assert options is PLAIN
    assert not (tmp_path / "runs").exists()


def test_a_missing_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2",
           "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0"}  # fmt: skip
    config = dataclasses.replace(CONFIG, runs_dir=str(tmp_path / "runs"))
    with pytest.raises(TopologyError, match="1"), nodes_of_step(config, PLAIN, env, timeout=0.2):
        pass
