"""Other machines to plan for: `--gpus`, `--gpus-per-node`, `--gpu` and `--gpu-memory`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from launcher.core.errors import ConfigError, Problem
from launcher.hardware.devices import Device, Hardware, library_versions
from strategies.gpus import GPUS, UnknownGpuError, find_gpu

_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MOST_GPUS = 1_000_000


@dataclass(frozen=True, slots=True)
class TargetMachines:
    """GPUs to plan for: their number over all nodes and on each node, and the hardware of each rank."""

    gpus: int
    gpus_per_node: int
    hardware: Hardware

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.gpus // self.gpus_per_node


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `launcher plan` for other machines."""
    group = parser.add_argument_group("plan for other machines")
    group.add_argument("--gpus", type=int, metavar="N", help="plan for N GPUs instead of this machine")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs on each node (default: 8, or all if fewer)")
    keys = ", ".join(gpu.key for gpu in GPUS)
    group.add_argument("--gpu", metavar="NAME", help=f"model of the GPUs, as nvidia-smi prints it or one of: {keys}")
    group.add_argument("--gpu-memory", metavar="SIZE",
                       help="memory of each GPU with its unit, as in 80GiB (default: of --gpu)")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="plot memory over the number of GPUs, by strategy (.png, .svg)")


def read_options(options: argparse.Namespace) -> TargetMachines | None:
    """The machines of the options; None if no option was given.

    Raises:
        ConfigError: lists every invalid option.
    """
    given = {name: getattr(options, name) for name in ("gpus", "gpus_per_node", "gpu", "gpu_memory")}
    if all(value is None for value in given.values()):
        return None
    problems: list[Problem] = []
    gpus = given["gpus"]
    if gpus is None or not 1 <= gpus <= _MOST_GPUS:
        found = "not given; give the number of GPUs to plan for" if gpus is None else f"given {gpus}"
        problems.append(Problem("--gpus", f"{found}; expected 1 to {_MOST_GPUS}"))
        gpus = 1
    per_node = given["gpus_per_node"] if given["gpus_per_node"] is not None else min(8, gpus)
    if per_node < 1 or gpus % per_node:
        problems.append(Problem("--gpus-per-node", f"given {per_node}; expected a number that divides {gpus} GPUs"))
    gpu = None
    if given["gpu"] is not None:
        try:
            gpu = find_gpu(given["gpu"])
        except UnknownGpuError as error:
            problems.append(Problem("--gpu", str(error)))
    memory = gpu.memory_bytes if gpu else 0
    size = given["gpu_memory"]
    if size is not None:
        memory = parse_size(size) or 0
        if memory <= 0:
            problems.append(Problem("--gpu-memory", f"given {size!r}; {_suggest_size(size)}"))
    elif gpu is None and given["gpu"] is None:
        problems.append(Problem("--gpu-memory", "not given; give the memory of a GPU, or its name with --gpu"))
    if problems:
        raise ConfigError(problems)
    # If only the memory is known, a recent GPU is assumed.
    dtypes = gpu.native_dtypes if gpu else ("bf16", "fp16", "fp32", "fp64")
    device = Device("cuda", 0, gpu.name if gpu else "GPU", memory, dtypes)
    return TargetMachines(gpus, per_node, Hardware(device, per_node, library_versions()))


def parse_size(text: str) -> int | None:
    """Bytes of '80GiB', '80 GB' or '16G' (as GB); None if it is not a size with a unit."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)b?\s*", text.lower())
    return None if found is None else int(float(found[1]) * _SCALES[found[2]])


def _suggest_size(text: str) -> str:
    """What to give instead of an invalid size."""
    number = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*b?\s*", text.lower())
    if number is None or not float(number[1]):
        return "expected a size as in 80GiB or 80GB"
    value = float(number[1])
    # A large number is one of bytes.
    gib = value / _SCALES["gi"] if value > _SCALES["mi"] else value
    return f"a size needs a unit: did you mean {gib:.4g}GiB?"
