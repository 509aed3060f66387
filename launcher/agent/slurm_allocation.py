"""`launcher fit` inside a SLURM allocation that is there already: a `salloc` shell, a batch script, or `srun`."""

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
    """Become `srun`, which starts this command once on each node of the allocation, if it should run there.

    Returns where this process is the one to go on: without an allocation, or with one of this node alone.
    """
    allocation = read_slurm_allocation(os.environ)
    words = None if allocation is None else srun_arguments(allocation, config, options, socket.gethostname())
    if allocation is None or words is None:
        return
    sys.stderr.write(f"notice: job {allocation.job_id} has {allocation.nodes} nodes: starting on them through srun\n")
    sys.stderr.flush()
    try:
        os.execvp(words[0], [*words, sys.executable, "-m", "launcher", *arguments])  # noqa: S606 -- no shell is wanted
    except OSError as error:
        raise TopologyError(
            f"job {allocation.job_id} is not of this machine alone, and srun cannot be started: {error.strerror}; add "
            "it to PATH, or set num_nodes: 1 to train here"
        ) from error


def srun_arguments(
    allocation: SlurmAllocation, config: RunConfig, options: LaunchOptions, host: str
) -> tuple[str, ...] | None:
    """How to start one agent on each node; None if this process is to train by itself. Pure.

    Args:
        allocation: around this process.
        config: what to train; `num_nodes: 1` keeps it here.
        options: flags that name the nodes by hand keep it here too.
        host: name of this machine.
    """
    if options.several_nodes:
        return None
    here = not allocation.nodelist or host.partition(".")[0] in expand_nodes(allocation.nodelist)
    nodes = allocation.nodes if config.num_nodes == "auto" else config.num_nodes
    if nodes > allocation.nodes:
        raise TopologyError(
            f"num_nodes is {nodes}, and job {allocation.job_id} has {allocation.nodes}; allocate more, or lower it"
        )
    if here and (nodes == 1 or config.num_nodes == 1):
        return None
    cpus = () if allocation.cpus_per_task is None else (f"--cpus-per-task={allocation.cpus_per_task}",)
    return ("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--export=ALL", *cpus)


@contextlib.contextmanager
def nodes_of_step(
    config: RunConfig, options: LaunchOptions, env: Mapping[str, str], timeout: float = 600.0
) -> Generator[LaunchOptions]:
    """The options of this node's agent, where `srun` has started one task on each of several nodes.

    Args:
        config: says the folder of the runs, in which the nodes meet.
        options: as given; returned unchanged where there is one node, or where they name the nodes by hand.
        env: SLURM's variables.
        timeout: seconds that the nodes wait for each other.

    Raises:
        TopologyError: the nodes do not find each other.
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
            place = stack.enter_context(rendezvous(file, task.node, task.nodes, names, timeout))
        except RendezvousError as error:
            raise TopologyError(str(error)) from error
        except OSError as error:
            raise TopologyError(
                f"the nodes cannot meet in {folder}: {error.strerror or error}; set another runs_dir"
            ) from error
        for variable in TASK_VARIABLES:
            # They say that this process is one of srun's tasks; the agent's ranks are none.
            os.environ.pop(variable, None)
        for variable in _INTERFACE_VARIABLES if place.interface is not None else ():
            # Whoever chose interfaces by hand keeps them.
            os.environ.setdefault(variable, str(place.interface))
        yield dataclasses.replace(
            options,
            min_nodes=task.nodes,
            max_nodes=task.nodes,
            node_rank=task.node,
            endpoint_host=place.host,
            endpoint_port=place.port,
            run_id=name,
        )
