"""How many ranks there are to be, and starting them on this machine where nobody else did."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence

from launcher.config import RunConfig
from launcher.errors import TopologyError
from launcher.hardware import available_kind, device_count
from launcher.topology import Topology


def wanted_ranks(config: RunConfig) -> int:
    """Ranks on this node: what `devices` says, else one for each GPU, else one.

    Raises:
        TopologyError: more ranks than GPUs, or no such accelerator.
    """
    kind = available_kind(config.accelerator)
    found = device_count(kind)
    if config.devices == "auto":
        return found
    if kind != "cpu" and config.devices > found:
        raise TopologyError(f"devices: {config.devices} was asked for, but this machine has {found} of kind {kind}")
    return config.devices


def check_ranks(config: RunConfig, topology: Topology) -> None:
    """Compare the ranks that there are with the config.

    Raises:
        TopologyError: they differ; says both numbers.
    """
    if config.devices not in ("auto", topology.local_world_size):
        raise TopologyError(
            f"devices: {config.devices} was asked for, but {topology.source} made {topology.local_world_size} "
            "ranks on this node; use `devices: auto`, or start as many"
        )
    if config.num_nodes not in ("auto", topology.num_nodes):
        raise TopologyError(
            f"num_nodes: {config.num_nodes} was asked for, but {topology.source} made ranks on {topology.num_nodes}; "
            "use `num_nodes: auto`, or start torchrun on each node with --nnodes"
        )


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `python -m launcher ARGUMENTS` as `count` ranks under torchelastic's agent, and wait for them.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun gives each rank one thread, which leaves most cores of a CPU machine idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=secrets.token_hex(8),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "launcher", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0
