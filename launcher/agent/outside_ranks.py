"""The rank of a script that SLURM's `srun` or MPI started several times: the one that Lightning would take it for."""

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

# Any of them: torchrun, or somebody like it, has made ranks.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Names of jobs in which Lightning leaves SLURM's tasks alone.
_INTERACTIVE = ("bash", "interactive")
# Open MPI's number of processes, and that of MPICH and Intel MPI.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Lightning's: a job's port is 15000 and the last four digits of its number.
_FIRST_PORT, _PORTS = 15000, 10000
# Steps of one job that run at once must not meet.
_PORTS_BETWEEN_STEPS = 331


def outside_rank(config: RunConfig, env: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of torchrun for one of srun's tasks or MPI's processes; None if this process is none of several.

    Args:
        config: says how many devices and nodes the script expects.
        env: the environment.

    Raises:
        TopologyError: the processes are no ranks that the config can be trained on.
    """
    if any(name in env for name in _TORCHRUN):
        return None
    try:
        task = read_slurm_task(env)
    except SlurmEnvironmentError as error:
        raise TopologyError(str(error)) from error
    if task is not None and task.tasks > 1:
        return None if env.get("SLURM_JOB_NAME") in _INTERACTIVE else _of_slurm(task, config, env)
    if any(env.get(name, "1") not in ("", "0", "1") for name in _MPI_SIZES):
        if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
            return to_torchrun_variables(env)
        # Without mpi4py `launcher.hardware.mpi_ranks` says what is missing.
        return _of_mpi() if importlib.util.find_spec("mpi4py") else None
    return None


def _of_slurm(task: SlurmTask, config: RunConfig, env: Mapping[str, str]) -> dict[str, str]:
    local = env.get("SLURM_LOCALID", "")
    on_each = task.tasks // task.nodes
    if not local.isdecimal() or task.tasks % task.nodes or task.task != task.node * on_each + int(local):
        raise TopologyError(
            f"srun started {task.tasks} tasks on {task.nodes} nodes, and this is task {task.task}, number "
            f"{local or 'unknown'} on node {task.node}; expected the same number on each node, in the nodes' order: "
            "srun --ntasks-per-node=N --distribution=block"
        )
    _check(config, task, on_each)
    address = "127.0.0.1" if task.nodes == 1 else env.get("MASTER_ADDR") or _first_node(env)
    number = int(task.job_id[-4:]) if task.job_id[-4:].isdecimal() else 0
    step = int(task.step) if task.step and task.step.isdecimal() else 0
    port = _FIRST_PORT + (number + step * _PORTS_BETWEEN_STEPS) % _PORTS
    return _variables(
        {
            "RANK": task.task,
            "WORLD_SIZE": task.tasks,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": on_each,
            "GROUP_RANK": task.node,
            "MASTER_ADDR": address,
            "MASTER_PORT": env.get("MASTER_PORT") or port,
            "TORCHELASTIC_RESTART_COUNT": task.restart_count,
        }
    )


def _check(config: RunConfig, task: SlurmTask, on_each: int) -> None:
    """Compare the tasks with what the script asks for, as Lightning does."""
    if config.devices not in ("auto", on_each):
        raise TopologyError(
            f"devices is {config.devices}, but srun started {on_each} task{'s' if on_each > 1 else ''} on each node, "
            f"and each is one rank; use srun --ntasks-per-node={config.devices}, or devices={on_each}"
        )
    if config.num_nodes not in ("auto", task.nodes):
        raise TopologyError(
            f"num_nodes is {config.num_nodes}, but srun started tasks on {task.nodes}; use srun "
            f"--nodes={config.num_nodes}, or num_nodes={task.nodes}"
        )
    if config.devices == "auto" and config.accelerator != "cpu":
        from launcher.hardware.devices import available_kind, device_count

        kind = available_kind(config.accelerator)
        if kind == "cuda" and (found := device_count(kind)) > on_each:
            raise TopologyError(
                f"this node has {found} GPUs for its {on_each} task{'s' if on_each > 1 else ''}, and each is one rank; "
                f"use srun --ntasks-per-node={found}, or devices={on_each}"
            )


def _first_node(env: Mapping[str, str]) -> str:
    """The node of rank zero, which the others can find by its name."""
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    # Names apart by spaces are Lightning's own notation.
    first = next(iter(expand_nodes(re.sub(r"\s+", ",", listed.strip()))), None) if listed.strip() else None
    if first is None:
        raise TopologyError("SLURM does not say which nodes the step has; set MASTER_ADDR to the address of the first")
    try:
        socket.getaddrinfo(first, None)
    except OSError as error:
        raise TopologyError(
            f"rank 0 is on {first}, the first of {listed}, whose name this node cannot look up: {error}; set "
            "MASTER_ADDR to its address, on every node"
        ) from error
    return first


def _of_mpi() -> dict[str, str] | None:
    """By Lightning's own environment for MPI, which asks mpi4py; None if that knows of no other process."""
    from lightning.fabric.plugins.environments import MPIEnvironment

    if not MPIEnvironment.detect():
        return None
    ranks = MPIEnvironment()
    local_rank = ranks.local_rank()
    return _variables(
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


def _variables(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}
