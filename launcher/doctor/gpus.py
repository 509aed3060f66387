"""Findings of `launcher doctor` about NVIDIA GPUs: pure functions of the facts that `gpu_probe` reads."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.doctor.command import Finding
from strategies.units import format_bytes, format_rate

# The oldest driver for each major version of CUDA: "CUDA minor version compatibility", CUDA Toolkit release notes.
_OLDEST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
# A link below this share of the median is named, as is memory beyond this share in other hands.
_SLOW_LINK = 0.5
_MEMORY_TAKEN = 0.1
# NCCL knows compute capability 10.0 and later (Blackwell) from here on; its release notes of 2.25.
_BLACKWELL_NCCL = (2, 25)


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """One GPU.

    Attributes:
        index: as this process numbers it.
        name: the vendor's.
        capability: CUDA's compute capability, as in (9, 0).
        memory_bytes: all of its memory.
        free_bytes: what nobody uses.
        native_dtypes: those of fp16, bf16, fp32, fp64 that it computes without emulation.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    native_dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one GPU's memory to another's.

    Attributes:
        one, other: indices of the GPUs.
        peer_access: whether they reach each other's memory without the host's.
        bytes_per_second: measured by copies, the slower direction; None if it was not measured.
        exact: whether what was copied arrived as it was.
    """

    one: int
    other: int
    peer_access: bool
    bytes_per_second: float | None
    exact: bool = True


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """Driver, torch build and GPUs of a machine.

    Attributes:
        driver: version of the kernel's driver, as in '550.54.15'; empty if it is not known.
        driver_cuda: newest CUDA that the driver's library speaks, as in (12, 4); None if it does not answer.
        torch: torch's version.
        torch_cuda: CUDA that torch was built for, as in '12.8'; None for a build without.
        architectures: what torch's kernels were compiled for, as in 'sm_90' or 'compute_90'.
        nccl: version of the NCCL that torch has loaded, as in '2.27.5'; empty without.
        nccl_installed: version of the NCCL that was installed with torch; empty if there is no such package.
        hidden_by: what CUDA_VISIBLE_DEVICES says; None if it is not set.
        said: what the driver or torch complained of; empty if nothing.
        gpus: those that torch sees.
        links: one for each pair of them.
    """

    driver: str
    driver_cuda: tuple[int, int] | None
    torch: str
    torch_cuda: str | None
    architectures: tuple[str, ...] = ()
    nccl: str = ""
    nccl_installed: str = ""
    hidden_by: str | None = None
    said: str = ""
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
        advice = "all ranks go at the pace and with the precision of the weakest; CUDA_VISIBLE_DEVICES chooses"
        yield Finding("GPUs", "warning", f"not alike: {', '.join(names)}", advice)
    yield from link_findings(facts.links)


def driver_finding(facts: GpuFacts) -> Finding:
    """Whether driver and torch build go together."""
    speaks = f", CUDA up to {_dotted(facts.driver_cuda)}" if facts.driver_cuda else ""
    driver = f"driver {facts.driver or 'of unknown version'}{speaks}"
    if facts.torch_cuda is None:
        advice = "reinstall torch from the index for CUDA: https://pytorch.org/get-started/locally"
        return Finding("CUDA", "failure", f"{driver}; but torch {facts.torch} is a build without CUDA", advice)
    found = f"{driver}; torch {facts.torch} is built for CUDA {facts.torch_cuda}"
    major = int(facts.torch_cuda.partition(".")[0])
    if facts.gpus:
        # A driver of the same major version runs all of its minor versions, but compiles no PTX of later ones.
        return Finding("CUDA", "ok", found)
    if "version mismatch" in facts.said:
        advice = "the driver was updated under the running kernel module: reboot, or reload the nvidia modules"
        return Finding("CUDA", "failure", f"{found}; {facts.said}", advice)
    oldest = _OLDEST_DRIVER.get(major)
    version = _numbers(facts.driver)
    if oldest is not None and version and version < oldest:
        advice = f"update the driver to {'.'.join(map(str, oldest))} or later, or install torch for an older CUDA"
        return Finding("CUDA", "failure", f"{found}, which needs a newer driver", advice)
    if facts.driver_cuda is not None and facts.driver_cuda[0] < major:
        advice = f"update the driver to one for CUDA {major}, or install torch for CUDA {facts.driver_cuda[0]}"
        return Finding("CUDA", "failure", f"{found}, which needs a newer driver", advice)
    if facts.hidden_by is not None:
        advice = "unset it, or name the GPUs that this run may use"
        return Finding("CUDA", "warning", f"{found}; CUDA_VISIBLE_DEVICES={facts.hidden_by!r} leaves no GPU", advice)
    said = f": {facts.said}" if facts.said else ""
    advice = "look at `nvidia-smi` and `dmesg | grep -i nvrm`; in a container, start it with --gpus all"
    return Finding("CUDA", "failure", f"{found}, but sees no GPU{said}", advice)


def nccl_finding(facts: GpuFacts) -> Finding:
    """The NCCL that is loaded, against the one that torch came with and against the GPUs."""
    if not facts.nccl:
        several = len(facts.gpus) > 1
        advice = "several GPUs train over gloo, slowly: install a torch build with NCCL" if several else ""
        return Finding("NCCL", "warning" if several else "ok", "this torch build has none", advice)
    if facts.nccl_installed and _numbers(facts.nccl)[:3] != _numbers(facts.nccl_installed)[:3]:
        advice = "another libnccl is found first: look at LD_LIBRARY_PATH and LD_PRELOAD, e.g. of a cluster's modules"
        return Finding("NCCL", "warning", f"{facts.nccl}, but torch came with {facts.nccl_installed}", advice)
    if any(gpu.capability >= (10, 0) for gpu in facts.gpus) and _numbers(facts.nccl)[:2] < _BLACKWELL_NCCL:
        advice = f"these GPUs need NCCL {_dotted(_BLACKWELL_NCCL)} or later: install a newer torch"
        return Finding("NCCL", "failure", f"{facts.nccl}, older than these GPUs", advice)
    return Finding("NCCL", "ok", facts.nccl)


def gpu_finding(gpu: DetectedGpu, facts: GpuFacts) -> Finding:
    """One GPU: whether torch has kernels for it, and whether it is free."""
    name, capability = f"cuda {gpu.index}", _dotted(gpu.capability)
    found = (
        f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, native: {', '.join(gpu.native_dtypes)}, "
        f"compute capability {capability}"
    )
    if facts.architectures and not has_kernels(gpu.capability, facts.architectures):
        advice = f"install a torch build for it; this one has {', '.join(facts.architectures)}"
        return Finding(name, "failure", f"{found}: torch {facts.torch} has no kernels for it", advice)
    taken = gpu.memory_bytes - gpu.free_bytes
    if taken > _MEMORY_TAKEN * gpu.memory_bytes:
        advice = "`nvidia-smi` shows whose; a run may then be out of memory where the plan says that it fits"
        return Finding(name, "warning", f"{found}; {format_bytes(taken)} are in use already", advice)
    return Finding(name, "ok", found)


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a build runs on a GPU: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".

    Machine code (`sm_XY`) runs on the same major version from minor Y on; `sm_XYa` on exactly XY. PTX (`compute_XY`)
    is compiled for any later GPU.
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
    """Peer access and speed of every pair: those that are alike in one line, the others named."""
    changed = [link for link in links if not link.exact]
    if changed:
        advice = "the IOMMU or PCIe ACS reroutes peer copies: switch it off in the BIOS, or set NCCL_P2P_DISABLE=1"
        yield Finding("GPU links", "failure", f"copies between GPUs {_pairs(changed)} arrive changed", advice)
    speeds = [link.bytes_per_second for link in links if link.bytes_per_second is not None]
    middle = statistics.median(speeds) if speeds else 0.0
    slow = [link for link in links if link.bytes_per_second is not None and link.bytes_per_second < _SLOW_LINK * middle]
    for direct in (True, False):
        group = [link for link in links if link.peer_access is direct and link not in slow]
        if group:
            found = f"{_pairs(group)}: {'peer access' if direct else 'through the host'}{_speed(group)}"
            yield Finding("GPU links", "ok", found)
    for link in sorted(slow, key=lambda link: link.bytes_per_second or 0.0):
        way = "peer access" if link.peer_access else "through the host"
        found = f"{_pairs([link])}: {way}{_speed([link])}, the median is {format_rate(middle)}"
        advice = "every all-reduce waits for it: `nvidia-smi topo -m` and `nvidia-smi nvlink -s` show why"
        yield Finding("GPU links", "warning", found, advice)


def _pairs(links: Sequence[Link]) -> str:
    shown = ", ".join(f"{link.one}-{link.other}" for link in links[:6])
    return shown if len(links) <= 6 else f"{shown} and {len(links) - 6} more"


def _speed(links: Sequence[Link]) -> str:
    speeds = [link.bytes_per_second for link in links if link.bytes_per_second is not None]
    if not speeds:
        return ""
    low, high = format_rate(min(speeds)), format_rate(max(speeds))
    return f", {low}" if low == high else f", {low} to {high}"


def _numbers(version: str) -> tuple[int, ...]:
    """(550, 54, 15) of '550.54.15'; what follows the numbers is left out."""
    read = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, read[0].split("."))) if read else ()


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
