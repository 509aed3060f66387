"""Finds the rank of a script that `srun` or MPI started several times: the same rank that Lightning would give it."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Mapping

from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from launcher.hardware.mpi_ranks import to_torchrun_variables
from slurm.environment import SlurmEnvironmentError, SlurmTask, read_slurm_task
from slurm.nodelist import expand_nodes

# If one of these is set, torchrun or a similar launcher has started the ranks.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Names of jobs whose tasks are not ranks for Lightning.
_INTERACTIVE = ("bash", "interactive")
# Open MPI's number of processes, and that of MPICH and Intel MPI.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# As in Lightning, a job's port is 15000 plus the last four digits of its id.
_FIRST_PORT, _PORTS = 15000, 10000
# Steps of one job that run at the same time need different ports.
_PORTS_BETWEEN_STEPS = 331


def read_external_rank(config: RunConfig, env: Mapping[str, str]) -> dict[str, str] | None:
    """Torchrun's variables for a task of srun or a process of MPI; None if this process is the only one.

    Raises:
        TopologyError: the processes do not match the config.
    """
    if any(name in env for name in _TORCHRUN):
        return None
    try:
        task = read_slurm_task(env)
    except SlurmEnvironmentError as error:
        raise TopologyError(str(error)) from error
    if task is not None and task.tasks > 1:
        return None if env.get("SLURM_JOB_NAME") in _INTERACTIVE else _rank_of_slurm_task(task, config, env)
    if any(env.get(name, "1") not in ("", "0", "1") for name in _MPI_SIZES):
        if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
            return to_torchrun_variables(env)
        # Without mpi4py `launcher.hardware.mpi_ranks` reports what is missing.
        return _rank_of_mpi_process() if importlib.util.find_spec("mpi4py") else None
    return None


def _rank_of_slurm_task(task: SlurmTask, config: RunConfig, env: Mapping[str, str]) -> dict[str, str]:
    local = env.get("SLURM_LOCALID", "")
    per_node = task.tasks // task.nodes
    if not local.isdecimal() or task.tasks % task.nodes or task.task != task.node * per_node + int(local):
        raise TopologyError(
            f"srun started {task.tasks} tasks on {task.nodes} nodes, and this is task {task.task}, local number "
            f"{local or 'unknown'} on node {task.node}; expected the same number of tasks on each node, in the order "
            "of the nodes; use srun --ntasks-per-node=N --distribution=block"
        )
    _check_config(config, task, per_node)
    address = "127.0.0.1" if task.nodes == 1 else env.get("MASTER_ADDR") or _first_node(env)
    number = int(task.job_id[-4:]) if task.job_id[-4:].isdecimal() else 0
    step = int(task.step) if task.step and task.step.isdecimal() else 0
    port = _FIRST_PORT + (number + step * _PORTS_BETWEEN_STEPS) % _PORTS
    return _to_text(
        {
            "RANK": task.task,
            "WORLD_SIZE": task.tasks,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": per_node,
            "GROUP_RANK": task.node,
            "MASTER_ADDR": address,
            "MASTER_PORT": env.get("MASTER_PORT") or port,
            "TORCHELASTIC_RESTART_COUNT": task.restart_count,
        }
    )


def _check_config(config: RunConfig, task: SlurmTask, per_node: int) -> None:
    """Compare the tasks with the config, as Lightning does."""
    if config.devices not in ("auto", per_node):
        raise TopologyError(
            f"devices is {config.devices}, but srun started {per_node} task{'s' if per_node > 1 else ''} on each node, "
            f"and each is one rank; use srun --ntasks-per-node={config.devices}, or devices={per_node}"
        )
    if config.num_nodes not in ("auto", task.nodes):
        raise TopologyError(
            f"num_nodes is {config.num_nodes}, but srun started tasks on {task.nodes} nodes; use srun "
            f"--nodes={config.num_nodes}, or num_nodes={task.nodes}"
        )
    if config.devices == "auto" and config.accelerator != "cpu":
        from launcher.hardware.devices import available_kind, device_count

        kind = available_kind(config.accelerator)
        if kind == "cuda" and (found := device_count(kind)) > per_node:
            raise TopologyError(
                f"this node has {found} GPUs but {per_node} task{'s' if per_node > 1 else ''}, one for each rank; "
                f"use srun --ntasks-per-node={found}, or devices={per_node}"
            )


def _first_node(env: Mapping[str, str]) -> str:
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    # Lightning also accepts names separated by spaces.
    first = next(iter(expand_nodes(re.sub(r"\s+", ",", listed.strip()))), None) if listed.strip() else None
    if first is None:
        raise TopologyError("SLURM_STEP_NODELIST is not set; set MASTER_ADDR to the address of the first node")
    try:
        socket.getaddrinfo(first, None)
    except OSError as error:
        raise TopologyError(
            f"cannot resolve the host name {first}, the first node of {listed}, on which rank 0 runs: {error}; set "
            "MASTER_ADDR to its address on every node"
        ) from error
    return first


def _rank_of_mpi_process() -> dict[str, str] | None:
    """From Lightning's MPI environment, which uses mpi4py; None if there is no other process."""
    from lightning.fabric.plugins.environments import MPIEnvironment

    if not MPIEnvironment.detect():
        return None
    ranks = MPIEnvironment()
    local_rank = ranks.local_rank()
    return _to_text(
        {
            "RANK": ranks.global_rank(),
            "WORLD_SIZE": ranks.world_size(),
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": vars(ranks)["_comm_local"].Get_size(),
            "GROUP_RANK": ranks.node_rank(),
            "MASTER_ADDR": ranks.main_address,
            "MASTER_PORT": ranks.main_port,
        }
    )


def _to_text(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
