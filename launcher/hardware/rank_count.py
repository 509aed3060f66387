"""How many ranks there are to be on this node."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from launcher.hardware.cpus import usable_cpus
from launcher.hardware.devices import available_kind, device_count
from launcher.hardware.topology import Topology


def requested_ranks(config: RunConfig, options: LaunchOptions | None = None) -> int:
    """Ranks on this node: what `--nproc-per-node` or `devices` says, else one for each GPU, else one.

    Raises:
        TopologyError: more ranks than GPUs, no such accelerator, or two different numbers.
    """
    kind = available_kind(config.accelerator)
    found = device_count(kind)
    asked = None if options is None else options.nproc_per_node
    if isinstance(asked, str):
        # torchrun's words: `auto` is a rank for each GPU, or for each usable CPU core where there is none.
        cores = asked == "cpu" or (asked == "auto" and kind == "cpu")
        asked = usable_cpus() if cores else device_count(available_kind("gpu"))
    if asked is not None and config.devices not in ("auto", asked):
        raise TopologyError(
            f"--nproc-per-node means {asked} ranks here, but devices is {config.devices}; leave out one of them"
        )
    wanted = asked or (found if config.devices == "auto" else config.devices)
    if kind != "cpu" and wanted > found:
        raise TopologyError(
            f"{wanted} ranks were asked for, but this machine has {found} of kind {kind}; start at most {found}"
        )
    return wanted


def likely_ranks(config: RunConfig, options: LaunchOptions, gpus: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """The same without torch, which takes seconds to import: a guess, good enough to start the fork server early."""
    asked = options.nproc_per_node
    if isinstance(asked, int):
        return asked
    if config.devices != "auto":
        return config.devices
    found = len(list(gpus.iterdir())) if config.accelerator != "cpu" and asked != "cpu" and gpus.is_dir() else 0
    found = min(found, _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), found))
    if asked in ("cpu", "auto") and not found:
        return usable_cpus()
    return max(found, 1)


def _visible(variable: str | None, found: int) -> int:
    """GPUs that CUDA_VISIBLE_DEVICES lets through: CUDA ends its list at the first number that is none."""
    if variable is None:
        return found
    listed = [word.strip() for word in variable.split(",")]
    return len(list(itertools.takewhile(lambda word: word and not word.startswith("-"), listed)))


def check_ranks(config: RunConfig, topology: Topology) -> None:
    """Compare the ranks that there are with the config.

    Raises:
        TopologyError: they differ; says both numbers.
    """
    if config.devices not in ("auto", topology.local_world_size):
        if topology.source == "single":
            raise TopologyError(
                f"devices: {config.devices} was asked for, but this process is one rank, and starts no other; use "
                f"TrainingCoordinator(devices={config.devices}), `launcher fit --devices {config.devices}` or torchrun"
            )
        raise TopologyError(
            f"devices: {config.devices} was asked for, but {topology.source} made {topology.local_world_size} "
            "ranks on this node; use `devices: auto`, or start as many"
        )
    if config.num_nodes not in ("auto", topology.num_nodes):
        raise TopologyError(
            f"num_nodes: {config.num_nodes} was asked for, but {topology.source} made ranks on {topology.num_nodes}; "
            "use `num_nodes: auto`, or start torchrun on each node with --nnodes"
        )
