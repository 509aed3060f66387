"""What this process has to train with: its device, what that computes natively, and the libraries' versions."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.core.errors import TopologyError
from strategies.precision import DeviceKind

# Libraries whose versions all ranks must share: they define the wire format, the numbers, or the checkpoint.
_SHARED_LIBRARIES = ("torch", "lightning", "deepspeed")
# What DeepSpeed compiles its ops with, and the packages to install.
BUILD_TOOLS = {"c++": "g++ (Debian, Ubuntu) or gcc-c++ (Fedora)", "ninja": "ninja-build, or activate the venv"}


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        kind: 'cpu', 'cuda' or 'mps'.
        index: number of the device among those of its kind that this process sees.
        name: the vendor's name.
        memory_bytes: all of its memory.
        native_dtypes: those of fp16, bf16, fp32, fp64 that it trains in without emulation.
    """

    kind: DeviceKind
    index: int
    name: str
    memory_bytes: int
    native_dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hardware:
    """One rank's device and libraries.

    Attributes:
        device: what this rank trains on.
        local_device_count: devices of that kind on this node; 1 for a CPU.
        versions: name to version, or a build tool's name to its path; None where it is not installed.
    """

    device: Device
    local_device_count: int
    versions: Mapping[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hardware:
        """The inverse of `to_dict`."""
        device = values["device"]
        return cls(
            device=Device(**{**device, "native_dtypes": tuple(device["native_dtypes"])}),
            local_device_count=values["local_device_count"],
            versions=values["versions"],
        )


def library_versions() -> dict[str, str | None]:
    """Versions of what all ranks must share, from the packages' metadata, and the paths of the build tools."""
    # Late: the agent starts without it, and its users wait for the start.
    import importlib.metadata

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _SHARED_LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    for tool in BUILD_TOOLS:
        # As torch's cpp_extension looks for them.
        versions[tool] = shutil.which(os.environ.get("CXX", tool) if tool == "c++" else tool)
    return versions


def available_kind(accelerator: str) -> DeviceKind:
    """The kind of device that `accelerator` ('auto', 'cpu', 'gpu', 'cuda', 'mps') means on this machine.

    Raises:
        TopologyError: the accelerator is not on this machine.
    """
    # NVML answers without initialising CUDA, so a process that asked can still fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    has: dict[DeviceKind, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if accelerator in ("auto", "gpu"):
        wanted: list[DeviceKind] = ["cuda", "mps", "cpu"] if accelerator == "auto" else ["cuda", "mps"]
    elif accelerator in ("cpu", "cuda", "mps"):
        wanted = [accelerator]
    else:
        raise TopologyError(f"accelerator {accelerator!r} does not exist; valid are auto, cpu, gpu, cuda, mps")
    for kind in wanted:
        if has[kind]:
            return kind
    raise TopologyError(
        f"accelerator {accelerator!r} was asked for, but this machine has only "
        f"{' and '.join(k for k in has if has[k])}; "
        "set `accelerator: auto`, or install a torch build that sees the device"
    )


def detect_hardware(accelerator: str, local_rank: int) -> Hardware:
    """Look at this machine.

    Args:
        accelerator: 'auto', 'cpu', 'gpu', 'cuda' or 'mps'.
        local_rank: which of the node's devices is this rank's.

    Raises:
        TopologyError: no such accelerator here, or fewer devices than ranks.
    """
    kind = available_kind(accelerator)
    count = device_count(kind)
    if kind == "cuda":
        if local_rank >= count:
            raise TopologyError(
                f"LOCAL_RANK={local_rank}, but this machine shows {count} CUDA device{'s' if count > 1 else ''}; "
                f"start at most {count} ranks here, or look at CUDA_VISIBLE_DEVICES"
            )
        device = _cuda_device(local_rank)
    elif kind == "mps":
        # Apple's GPU shares the machine's memory; Lightning has no autocast for it.
        device = Device("mps", 0, "Apple GPU", _machine_memory(), ("fp32", "fp16"))
    else:
        # No half precision, even with AVX512-BF16: it was measured slower (tests/benchmarks/RESULTS.md).
        device = Device("cpu", 0, _cpu_name(), _machine_memory(), ("fp32", "fp64"))
    return Hardware(device, count, library_versions())


def device_count(kind: DeviceKind) -> int:
    """Devices of `kind` that this process sees; a CPU counts as one."""
    if kind != "cuda":
        return 1
    import torch

    return torch.cuda.device_count()


def _cuda_device(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        # By default torch also answers True where it emulates bf16, which is slower than fp32.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    # Compute capability 5.3 brought native fp16 arithmetic.
    fp16 = (properties.major, properties.minor) >= (5, 3)
    dtypes = ["fp32", "fp64", *(["fp16"] if fp16 else []), *(["bf16"] if bf16 else [])]
    return Device("cuda", index, properties.name, properties.total_memory, tuple(dtypes))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 -- read line by line, 200 KB on big machines
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows less, but something
    return platform.processor() or platform.machine()


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
