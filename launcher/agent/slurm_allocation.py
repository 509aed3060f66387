"""`launcher fit` inside an existing SLURM allocation: in a `salloc` shell, a batch script, or a task of `srun`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from slurm.environment import TASK_VARIABLES, SlurmAllocation, read_slurm_allocation, read_slurm_task
from slurm.nodelist import expand_nodes
from slurm.rendezvous import RendezvousError, rendezvous

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def enter_allocation(config: RunConfig, options: LaunchOptions, arguments: Sequence[str]) -> None:
    """Replace this process by `srun`, which starts this command once on each node of the allocation.

    Returns if this process should continue: without an allocation, or with an allocation of this node only.
    """
    allocation = read_slurm_allocation(os.environ)
    if allocation is None:
        return
    srun = build_srun_command(allocation, config, options, socket.gethostname())
    if srun is None:
        return
    sys.stderr.write(f"notice: job {allocation.job_id} has {allocation.nodes} nodes: starting on them through srun\n")
    sys.stderr.flush()
    try:
        command = [*srun, sys.executable, "-m", "launcher", *arguments]
        os.execvp(command[0], command)  # noqa: S606 -- no shell is needed
    except OSError as error:
        raise TopologyError(
            f"job {allocation.job_id} has other nodes, but srun cannot be started: {error.strerror}; add srun to PATH, "
            "or set num_nodes: 1 to train on this node"
        ) from error


def build_srun_command(
    allocation: SlurmAllocation, config: RunConfig, options: LaunchOptions, host: str
) -> tuple[str, ...] | None:
    """The command that starts one agent on each node; None if this process trains itself. Pure.

    With explicit nodes (`--nnodes`) this process is one of them; with `num_nodes: 1` it is the only one.
    """
    if options.several_nodes:
        return None
    here = not allocation.nodelist or host.partition(".")[0] in expand_nodes(allocation.nodelist)
    nodes = allocation.nodes if config.num_nodes == "auto" else config.num_nodes
    if nodes > allocation.nodes:
        raise TopologyError(
            f"num_nodes is {nodes}, but job {allocation.job_id} has {allocation.nodes}; allocate more nodes, or lower "
            "num_nodes"
        )
    if here and (nodes == 1 or config.num_nodes == 1):
        return None
    cpus = () if allocation.cpus_per_task is None else (f"--cpus-per-task={allocation.cpus_per_task}",)
    return ("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--export=ALL", *cpus)


@contextlib.contextmanager
def nodes_of_step(
    config: RunConfig, options: LaunchOptions, env: Mapping[str, str], timeout: float = 600.0
) -> Generator[LaunchOptions]:
    """The options of this node's agent, if `srun` has started one task on each of several nodes; otherwise unchanged.

    The nodes exchange the address through a file in `runs_dir` and wait up to `timeout` seconds for each other.

    Raises:
        TopologyError: the rendezvous of the nodes failed.
    """
    task = read_slurm_task(env)
    if task is None or not task.has_one_task_per_node or options.several_nodes:
        yield options
        return
    folder = Path(config.runs_dir).absolute()
    name = f"{task.job_id}-{task.step}-{task.restart_count}"
    names = [env.get("SLURMD_NODENAME", socket.gethostname()), socket.gethostname()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = folder / f".rendezvous-{name}.json"
            endpoint = stack.enter_context(rendezvous(file, task.node, task.nodes, names, timeout))
        except RendezvousError as error:
            raise TopologyError(str(error)) from error
        except OSError as error:
            raise TopologyError(
                f"cannot write the rendezvous file into {folder}: {error.strerror or error}; set another runs_dir"
            ) from error
        for variable in TASK_VARIABLES:
            # They describe a task of srun; the ranks of the agent are not tasks.
            os.environ.pop(variable, None)
        for variable in _INTERFACE_VARIABLES if endpoint.interface is not None else ():
            # Interfaces that the user has set stay.
            os.environ.setdefault(variable, str(endpoint.interface))
        yield dataclasses.replace(
            options,
            min_nodes=task.nodes,
            max_nodes=task.nodes,
            node_rank=task.node,
            endpoint_host=endpoint.host,
            endpoint_port=endpoint.port,
            run_id=name,
        )
