"""The checks of `launcher doctor`: what is measured, and from where on it is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from launcher.doctor import Check, Finding
from slurm.partitions import PartitionsError, read_partitions

_GIB = 2**30
# NCCL's and the data loaders' shared memory; a container has 64 MiB unless told otherwise.
_SHARED_MEMORY_BYTES = _GIB
_DISK_BYTES = 10 * _GIB
# Ranks, loader workers and their pipes: 1024, the usual soft limit, is reached with 8 ranks of 16 workers.
_OPEN_FILES = 4096
_WANDB_TIMEOUT_S = 5.0


def check_versions() -> Iterator[Finding]:
    """Python, and every library that the launcher needs, against the versions that it was tested with."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield (
        Finding("python", "ok", python)
        if sys.version_info >= (3, 11)
        else Finding("python", "failure", python, "install Python 3.11 or newer")
    )
    for text in importlib.metadata.requires("launcher") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield version_finding(requirement)


def version_finding(requirement: Requirement) -> Finding:
    """One library against the versions that are known to work."""
    advice = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "failure", "not installed", advice)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version)
    return Finding(requirement.name, "failure", f"{version}; known to work: {requirement.specifier}", advice)


def check_devices() -> Iterator[Finding]:
    """Every device with its memory and what it computes natively."""
    from launcher.hardware import detect_hardware

    first = detect_hardware("auto", 0)
    for index in range(first.local_device_count):
        device = detect_hardware("auto", index).device
        memory = f"{device.memory_bytes / _GIB:.0f} GiB"
        found = f"{device.name}, {memory}, native: {', '.join(device.native_dtypes)}"
        if device.kind == "cpu":
            yield Finding("device", "warning", found, cpu_advice())
        else:
            yield Finding(f"{device.kind} {index}", "ok", found)


def cpu_advice() -> str:
    """Why there is no GPU: none in the machine, or one that this torch build does not see."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA driver is here, but torch sees no GPU: install torch for CUDA, look at CUDA_VISIBLE_DEVICES"
    return "no GPU: fine for debugging"


def check_compiler() -> Iterator[Finding]:
    """What DeepSpeed builds its extensions with."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    advice = "DeepSpeed builds its CPU Adam with it: apt-get install g++"
    yield Finding("C++ compiler", "ok", compiler) if compiler else Finding("C++ compiler", "warning", "no g++", advice)
    # pip puts it beside Python, which need not be on PATH.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    yield (
        Finding("ninja", "ok", ninja)
        if ninja
        else Finding("ninja", "warning", "not found", "DeepSpeed builds with it: pip install ninja")
    )


def check_memory_and_disk() -> Iterator[Finding]:
    """Free shared memory, and free space where runs are written."""
    yield space_finding("shared memory", "/dev/shm", _SHARED_MEMORY_BYTES, "docker run --shm-size=8g, or --ipc=host")  # noqa: S108 -- only looked at
    yield space_finding(
        "disk", str(Path.cwd()), _DISK_BYTES, "set runs_dir to a larger disk; checkpoints are written there"
    )


def space_finding(name: str, path: str, wanted: int, advice: str) -> Finding:
    """Free space at `path` against what is wanted, in bytes."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, "warning", f"{path}: {error.strerror or error}", advice)
    found = f"{free / _GIB:.1f} GiB free at {path}"
    return Finding(name, "ok", found) if free >= wanted else Finding(name, "warning", found, advice)


def check_limits() -> Iterator[Finding]:
    """How many files a rank may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield open_files_finding(soft, hard)


def open_files_finding(soft: int, hard: int) -> Finding:
    """The limit of open files; -1 is none."""
    found = f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} open files"
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        return Finding("open files", "ok", found)
    raised = hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES
    advice = (
        f"ulimit -n {_OPEN_FILES}" if raised else f"ask for a hard limit of {_OPEN_FILES} (limits.conf); it is {hard}"
    )
    return Finding("open files", "warning", found, advice)


def check_hostname() -> Iterator[Finding]:
    """Whether other nodes could find this one by its name."""
    name = socket.gethostname()
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None)}
    except OSError as error:
        yield Finding("hostname", "failure", f"{name} has no address: {error}", f"add {name} to /etc/hosts or DNS")
        return
    yield hostname_finding(name, addresses)


def hostname_finding(name: str, addresses: set[str]) -> Finding:
    """A name that only means this machine itself is no use to other nodes."""
    found = f"{name} is {', '.join(sorted(addresses))}"
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        advice = "fine on one machine; other nodes need its network address in /etc/hosts or DNS"
        return Finding("hostname", "warning", found, advice)
    return Finding("hostname", "ok", found)


def check_wandb() -> Iterator[Finding]:
    """W&B's key, and its server if there is one."""
    from launcher.config import WandbOptions
    from launcher.wandb_run import resolve_mode

    mode, remark = resolve_mode(WandbOptions(), os.environ)
    if remark is not None:
        yield Finding("W&B", "warning", remark, "until then runs are kept in their folders for `wandb sync`")
        return
    if mode != "online":
        yield Finding("W&B", "ok", f"WANDB_MODE={mode}")
        return
    yield reach_finding(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def reach_finding(url: str) -> Finding:
    """Whether W&B's server answers, whatever it answers."""
    if not url.startswith(("http://", "https://")):
        return Finding("W&B", "failure", f"WANDB_BASE_URL={url!r} is no web address", "begin it with https://")
    try:
        urllib.request.urlopen(url, timeout=_WANDB_TIMEOUT_S).close()  # noqa: S310 -- http and https only
    except urllib.error.HTTPError as error:
        error.close()  # it answered
    except OSError as error:
        advice = "runs go offline after wandb.init_timeout; look at the proxy, or set wandb.mode: offline"
        return Finding("W&B", "warning", f"a key is at hand, but {url} does not answer: {error}", advice)
    return Finding("W&B", "ok", f"a key is at hand, and {url} answers")


def check_slurm() -> Iterator[Finding]:
    """The cluster's partitions, where there is a cluster."""
    try:
        partitions = read_partitions()
    except PartitionsError as error:
        yield Finding("SLURM", "failure", str(error), "ask the cluster's people, or try again in a minute")
        return
    if not partitions:
        yield Finding("SLURM", "ok", "no sinfo here: not a cluster's login node")
    for partition in partitions:
        found = (
            f"{partition.name}: {partition.nodes} nodes, {partition.gpus_per_node} GPUs each, {partition.time_limit}"
        )
        if partition.is_up:
            yield Finding("SLURM", "ok", found)
        else:
            yield Finding("SLURM", "warning", f"{found}, down", "jobs do not start there")


CHECKS: tuple[Check, ...] = (
    check_versions,
    check_devices,
    check_compiler,
    check_memory_and_disk,
    check_limits,
    check_hostname,
    check_wandb,
    check_slurm,
)
