"""The device of this process, its native dtypes, and the versions of the libraries."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.core.errors import TopologyError
from strategies.precision import DeviceKind

# All ranks must have the same versions: these libraries define messages, numerics, or checkpoints.
_SHARED_LIBRARIES = ("torch", "lightning", "deepspeed")
# Kinds of device by value of `accelerator`, in order of preference.
_KINDS: Mapping[str, tuple[DeviceKind, ...]] = {
    "auto": ("cuda", "mps", "cpu"),
    "cpu": ("cpu",),
    "gpu": ("cuda", "mps"),
    "cuda": ("cuda",),
    "mps": ("mps",),
}
# Tools with which DeepSpeed compiles its ops, and the packages that contain them.
BUILD_TOOLS = {"c++": "g++ (Debian, Ubuntu) or gcc-c++ (Fedora)", "ninja": "ninja-build, or activate the venv"}


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `index` counts the devices of its kind in this process, `native_dtypes` need no emulation."""

    kind: DeviceKind
    index: int
    name: str
    memory_bytes: int
    native_dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hardware:
    """Device and libraries of one rank.

    Attributes:
        local_device_count: devices of that kind on this node; 1 for a CPU.
        versions: library to version, and build tool to path; None if it is not installed.
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
    """Versions of the shared libraries, from their metadata, and paths of the build tools."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: _installed_version(name) for name in _SHARED_LIBRARIES}
    for tool in BUILD_TOOLS:
        # The same lookup as in torch's cpp_extension.
        versions[tool] = shutil.which(os.environ.get("CXX", tool) if tool == "c++" else tool)
    return versions


@functools.cache
def _installed_version(name: str) -> str | None:
    """Kept in this process and the ranks forked from it: so are the imported modules, whatever is installed later."""
    # Imported here for a faster start of the agent.
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_kind(accelerator: str) -> DeviceKind:
    """The kind of device that `accelerator`, a key of `_KINDS`, selects on this machine.

    Raises:
        TopologyError: this machine has no such accelerator.
    """
    # NVML does not initialize CUDA, so this process can still fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if accelerator not in _KINDS:
        raise TopologyError(f"accelerator {accelerator!r} does not exist; valid are {', '.join(_KINDS)}")
    has: dict[DeviceKind, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    for kind in _KINDS[accelerator]:
        if has[kind]:
            return kind
    raise TopologyError(
        f"accelerator {accelerator!r} was requested, but this machine has only "
        f"{' and '.join(k for k in has if has[k])}; "
        "set `accelerator: auto`, or install a torch build for the device"
    )


def detect_hardware(accelerator: str, local_rank: int) -> Hardware:
    """Detect the device and the libraries of this process.

    Raises:
        TopologyError: this machine has no such accelerator, or fewer devices than ranks.
    """
    kind = available_kind(accelerator)
    count = device_count(kind)
    if kind == "cuda":
        if local_rank >= count:
            raise TopologyError(
                f"LOCAL_RANK={local_rank}, but this process sees {count} CUDA device{'s' if count > 1 else ''}; "
                f"start at most {count} ranks here, or check CUDA_VISIBLE_DEVICES"
            )
        device = _cuda_device(local_rank)
    elif kind == "mps":
        # The GPU shares the memory of the machine; Lightning has no autocast for it.
        device = Device("mps", 0, "Apple GPU", host_memory(), ("fp32", "fp16"))
    else:
        # No half precision, even with AVX512-BF16: it was measured slower (tests/benchmarks/RESULTS.md).
        device = Device("cpu", 0, _cpu_name(), host_memory(), ("fp32", "fp64"))
    return Hardware(device, count, library_versions())


def device_count(kind: DeviceKind) -> int:
    """Number of devices of `kind` that this process sees; 1 for the CPU."""
    if kind != "cuda":
        return 1
    import torch

    return torch.cuda.device_count()


def _cuda_device(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        # By default torch also returns True if it emulates bf16, which is slower than fp32.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    # Native fp16 arithmetic needs compute capability 5.3.
    fp16 = (properties.major, properties.minor) >= (5, 3)
    dtypes = ["fp32", "fp64", *(["fp16"] if fp16 else []), *(["bf16"] if bf16 else [])]
    return Device("cuda", index, properties.name, properties.total_memory, tuple(dtypes))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 -- read by line: 200 KB on large machines
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: `platform` knows less
    return platform.processor() or platform.machine()


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
