"""The number of ranks on this node."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.core.errors import TopologyError
from launcher.hardware.cpus import count_usable_cpus
from launcher.hardware.devices import available_kind, device_count
from launcher.hardware.topology import Topology


def count_requested_ranks(config: RunConfig, options: LaunchOptions | None = None) -> int:
    """Ranks on this node: `--nproc-per-node` or `devices` if given, else one for each GPU, else one.

    Raises:
        TopologyError: more ranks than GPUs, no such accelerator, or options that contradict each other.
    """
    kind = available_kind(config.accelerator)
    found = device_count(kind)
    asked = None if options is None else options.nproc_per_node
    if isinstance(asked, str):
        # As in torchrun: `auto` is a rank for each GPU, or for each usable CPU core without a GPU.
        cores = asked == "cpu" or (asked == "auto" and kind == "cpu")
        asked = count_usable_cpus() if cores else device_count(available_kind("gpu"))
    if asked is not None and config.devices not in ("auto", asked):
        source = "devices" if options is None else options.devices_source
        advice = "remove one of them" if source.startswith("--") else f"give --devices {asked} instead"
        raise TopologyError(f"given --nproc-per-node {asked}, but {source} is {config.devices}; {advice}")
    wanted = asked or (found if config.devices == "auto" else config.devices)
    if kind != "cpu" and wanted > found:
        raise TopologyError(f"given {wanted} ranks, but this machine has {found} {kind} devices; start at most {found}")
    return wanted


def estimate_ranks(config: RunConfig, options: LaunchOptions, gpus: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """An estimate without importing torch, which takes seconds: it lets the fork server start early."""
    asked = options.nproc_per_node
    if isinstance(asked, int):
        return asked
    if config.devices != "auto":
        return config.devices
    found = len(list(gpus.iterdir())) if config.accelerator != "cpu" and asked != "cpu" and gpus.is_dir() else 0
    found = min(found, _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), found))
    if asked in ("cpu", "auto") and not found:
        return count_usable_cpus()
    return max(found, 1)


def _visible(variable: str | None, found: int) -> int:
    """GPUs in CUDA_VISIBLE_DEVICES: CUDA ends the list at the first invalid number."""
    if variable is None:
        return found
    entries = [entry.strip() for entry in variable.split(",")]
    return len(list(itertools.takewhile(lambda entry: entry and not entry.startswith("-"), entries)))


def check_ranks(config: RunConfig, topology: Topology) -> None:
    """Compare the actual ranks with the config.

    Raises:
        TopologyError: they differ; contains both numbers.
    """
    if config.devices not in ("auto", topology.local_world_size):
        if topology.source == "single":
            raise TopologyError(
                f"devices: {config.devices} was requested, but this process is one rank and starts no others; use "
                f"TrainingCoordinator(devices={config.devices}), `launcher fit --devices {config.devices}` or torchrun"
            )
        raise TopologyError(
            f"devices: {config.devices} was requested, but {topology.source} started {topology.local_world_size} "
            "ranks on this node; use `devices: auto`, or start as many"
        )
    if config.num_nodes not in ("auto", topology.num_nodes):
        raise TopologyError(
            f"num_nodes: {config.num_nodes} was requested, but {topology.source} started ranks on "
            f"{topology.num_nodes}; use `num_nodes: auto`, or start torchrun on each node with --nnodes"
        )
