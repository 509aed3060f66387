"""Findings about NVIDIA GPUs, from the facts that `gpu_probe` reads in another process."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.core.own_modules import module_command
from launcher.doctor.finding import Finding, judge
from strategies.units import format_bytes, format_rate

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# The oldest driver for each major version of CUDA: "CUDA minor version compatibility", CUDA Toolkit release notes.
_OLDEST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
# A link slower than this share of the median is reported, and so is used memory above this share.
_SLOW_LINK = 0.5
_MEMORY_USED = 0.1
# The first NCCL for compute capability 10.0 (Blackwell): release notes of NCCL 2.25.
_BLACKWELL_NCCL = (2, 25)


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """One GPU.

    Attributes:
        index: number in this process.
        capability: CUDA's compute capability, as in (9, 0).
        native_dtypes: those of fp16, bf16, fp32, fp64 that need no emulation.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    native_dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """The connection between the memories of two GPUs, given by their indices.

    Attributes:
        peer_access: whether copies bypass the memory of the host.
        bytes_per_second: of the slower direction; None if not measured.
        exact: whether the copies were correct.
    """

    one: int
    other: int
    peer_access: bool
    bytes_per_second: float | None
    exact: bool = True


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """Driver, torch build and GPUs of a machine; an unknown version is empty or None.

    Attributes:
        driver: version of the kernel module, as in '550.54.15'.
        driver_cuda: newest CUDA that the driver supports, as in (12, 4).
        torch_cuda: CUDA that torch was built for, as in '12.8'; None for a build without CUDA.
        architectures: targets of the kernels of torch, as in 'sm_90' or 'compute_90'.
        nccl: version of the loaded NCCL, as in '2.27.5'.
        nccl_installed: version of the NCCL package of torch.
        hidden_by: value of CUDA_VISIBLE_DEVICES; None if it is not set.
        error: error message of the driver or of torch; empty if there is none.
        links: one for each pair of GPUs that torch sees.
    """

    driver: str
    driver_cuda: tuple[int, int] | None
    torch: str
    torch_cuda: str | None
    architectures: tuple[str, ...] = ()
    nccl: str = ""
    nccl_installed: str = ""
    hidden_by: str | None = None
    error: str = ""
    gpus: tuple[DetectedGpu, ...] = ()
    links: tuple[Link, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GpuFacts:
        """The inverse of `dataclasses.asdict`, from JSON."""
        pair = values["driver_cuda"]
        gpus = (DetectedGpu(**{**g, "capability": tuple(g["capability"]), "native_dtypes": tuple(g["native_dtypes"])})
                for g in values["gpus"])  # fmt: skip
        return cls(**{
            **values,
            "driver_cuda": None if pair is None else (int(pair[0]), int(pair[1])),
            "architectures": tuple(values["architectures"]),
            "gpus": tuple(gpus),
            "links": tuple(Link(**link) for link in values["links"]),
        })  # fmt: skip


def has_nvidia_driver(file: Path = DRIVER_FILE) -> bool:
    """Whether this machine has an NVIDIA driver, with or without a CUDA build of torch."""
    return file.exists() or shutil.which("nvidia-smi") is not None


def probe_gpus(timeout: float) -> GpuFacts:
    """Read the facts in another process, within `timeout` seconds.

    Raises:
        TimeoutError: the driver did not answer.
        RuntimeError: the process ended without facts; contains its last line of output.
    """
    command = module_command("launcher.doctor.gpu_probe")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the NVIDIA driver did not answer within {timeout:g} s") from None
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        return GpuFacts.from_dict(json.loads(done.stdout.splitlines()[-1]))
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
    raise RuntimeError(f"the GPU probe ended with exit code {done.returncode}: {lines[-1]}")


def gpu_findings(facts: GpuFacts) -> Iterator[Finding]:
    """Driver, CUDA, NCCL, every GPU and the links between them."""
    yield driver_finding(facts)
    if not facts.gpus:
        return
    yield nccl_finding(facts)
    for gpu in facts.gpus:
        yield gpu_finding(gpu, facts)
    names = sorted({gpu.name for gpu in facts.gpus})
    if len(names) > 1:
        advice = "the weakest GPU sets speed and precision of all ranks: select GPUs with CUDA_VISIBLE_DEVICES"
        yield Finding("GPUs", "warning", f"different models: {', '.join(names)}", advice)
    yield from link_findings(facts.links)


def driver_finding(facts: GpuFacts) -> Finding:
    """Whether the driver supports the torch build."""
    supported = f", CUDA up to {_format_version(facts.driver_cuda)}" if facts.driver_cuda else ""
    driver = f"driver {facts.driver or 'of unknown version'}{supported}"
    if facts.torch_cuda is None:
        advice = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        return Finding("CUDA", "failure", f"{driver}; torch {facts.torch} is a build without CUDA", advice)
    found = f"{driver}; torch {facts.torch} is built for CUDA {facts.torch_cuda}"
    major = int(facts.torch_cuda.partition(".")[0])
    if facts.gpus:
        # A driver runs every minor version of its CUDA, but does not compile PTX of later minor versions.
        return Finding("CUDA", "ok", found)
    if "version mismatch" in facts.error:
        advice = "the driver was updated under the running kernel module: reboot, or reload the nvidia modules"
        return Finding("CUDA", "failure", f"{found}; {facts.error}", advice)
    oldest = _OLDEST_DRIVER.get(major)
    version = _parse_version(facts.driver)
    if oldest is not None and version and version < oldest:
        advice = f"update the driver to {'.'.join(map(str, oldest))} or later, or install torch for an older CUDA"
        return Finding("CUDA", "failure", f"{found}, which needs a newer driver", advice)
    if facts.driver_cuda is not None and facts.driver_cuda[0] < major:
        advice = f"update the driver to one for CUDA {major}, or install torch for CUDA {facts.driver_cuda[0]}"
        return Finding("CUDA", "failure", f"{found}, which needs a newer driver", advice)
    if facts.hidden_by is not None:
        advice = "unset it, or list the GPUs that this run may use"
        return Finding("CUDA", "warning", f"{found}; CUDA_VISIBLE_DEVICES={facts.hidden_by!r} leaves no GPU", advice)
    reason = f": {facts.error}" if facts.error else ""
    advice = "check `nvidia-smi` and `dmesg | grep -i nvrm`; start a container with --gpus all"
    return Finding("CUDA", "failure", f"{found}, but torch sees no GPU{reason}", advice)


def nccl_finding(facts: GpuFacts) -> Finding:
    """Whether the loaded NCCL is the one of torch, and supports the GPUs."""
    if not facts.nccl:
        several = len(facts.gpus) > 1
        advice = "several GPUs train slowly over gloo: install a torch build with NCCL" if several else ""
        return Finding("NCCL", "warning" if several else "ok", "this torch build has no NCCL", advice)
    if facts.nccl_installed and _parse_version(facts.nccl)[:3] != _parse_version(facts.nccl_installed)[:3]:
        advice = "another libnccl is found first: check LD_LIBRARY_PATH and LD_PRELOAD, for example of loaded modules"
        return Finding("NCCL", "warning", f"{facts.nccl}, but torch was installed with {facts.nccl_installed}", advice)
    if any(gpu.capability >= (10, 0) for gpu in facts.gpus) and _parse_version(facts.nccl)[:2] < _BLACKWELL_NCCL:
        advice = f"these GPUs need NCCL {_format_version(_BLACKWELL_NCCL)} or later: install a newer torch"
        return Finding("NCCL", "failure", f"{facts.nccl}, which does not support these GPUs", advice)
    return Finding("NCCL", "ok", facts.nccl)


def gpu_finding(gpu: DetectedGpu, facts: GpuFacts) -> Finding:
    """One GPU: whether torch has kernels for it, and whether its memory is free."""
    name, capability = f"cuda {gpu.index}", _format_version(gpu.capability)
    found = (
        f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, native: {', '.join(gpu.native_dtypes)}, "
        f"compute capability {capability}"
    )
    if facts.architectures and not has_kernels(gpu.capability, facts.architectures):
        advice = f"install a torch build for this GPU; this one supports {', '.join(facts.architectures)}"
        return Finding(name, "failure", f"{found}: torch {facts.torch} has no kernels for it", advice)
    used = gpu.memory_bytes - gpu.free_bytes
    is_free = used <= _MEMORY_USED * gpu.memory_bytes
    advice = "`nvidia-smi` lists the processes; a run may run out of memory although the plan fits"
    return judge(name, is_free, found if is_free else f"{found}; {format_bytes(used)} are in use", advice)


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build runs on a GPU (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility").

    Machine code (`sm_XY`) runs on the same major version with minor version Y or later, `sm_XYa` only on XY. PTX
    (`compute_XY`) is compiled for any later GPU.
    """
    for text in architectures:
        read = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", text)
        if read is None:
            continue
        built = (int(read[2]), int(read[3]))
        if read[4] == "a":
            runs = built == capability
        elif read[1] == "sm" or read[4] == "f":
            runs = built[0] == capability[0] and built[1] <= capability[1]
        else:
            runs = built <= capability
        if runs:
            return True
    return False


def link_findings(links: Sequence[Link]) -> Iterator[Finding]:
    """Peer access and speed of every pair: similar pairs in one finding, slow ones each in their own."""
    corrupted = [link for link in links if not link.exact]
    if corrupted:
        advice = "IOMMU or PCIe ACS redirects peer copies: disable it in the BIOS, or set NCCL_P2P_DISABLE=1"
        yield Finding("GPU links", "failure", f"copies between GPUs {_format_pairs(corrupted)} are corrupted", advice)
    speeds = [link.bytes_per_second for link in links if link.bytes_per_second is not None]
    middle = statistics.median(speeds) if speeds else 0.0
    slow = [link for link in links if link.bytes_per_second is not None and link.bytes_per_second < _SLOW_LINK * middle]
    for has_peer_access in (True, False):
        group = [link for link in links if link.peer_access is has_peer_access and link not in slow]
        if group:
            yield Finding("GPU links", "ok", _describe_links(group))
    for link in sorted(slow, key=lambda link: link.bytes_per_second or 0.0):
        found = f"{_describe_links([link])}, the median is {format_rate(middle)}"
        advice = "every all-reduce waits for it: check `nvidia-smi topo -m` and `nvidia-smi nvlink -s`"
        yield Finding("GPU links", "warning", found, advice)


def _format_pairs(links: Sequence[Link]) -> str:
    shown = ", ".join(f"{link.one}-{link.other}" for link in links[:6])
    return shown if len(links) <= 6 else f"{shown} and {len(links) - 6} more"


def _describe_links(links: Sequence[Link]) -> str:
    """Pairs, kind and speeds of links of one kind."""
    found = f"{_format_pairs(links)}: {'peer access' if links[0].peer_access else 'through host memory'}"
    speeds = [link.bytes_per_second for link in links if link.bytes_per_second is not None]
    if not speeds:
        return found
    low, high = format_rate(min(speeds)), format_rate(max(speeds))
    return f"{found}, {low}" if low == high else f"{found}, {low} to {high}"


def _parse_version(version: str) -> tuple[int, ...]:
    """(550, 54, 15) for '550.54.15'; ignores a suffix."""
    read = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, read[0].split("."))) if read else ()


def _format_version(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
