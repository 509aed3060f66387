"""The checks of `launcher doctor`: what is measured, and from where on it is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from launcher.doctor.command import Check, Finding
from launcher.doctor.gpu_probe import has_nvidia_driver, probe_gpus
from launcher.doctor.gpus import gpu_findings
from launcher.doctor.network import check_hostname, check_interfaces, read_ports
from slurm.partitions import PartitionsError, read_partitions
from slurm.version import OLDEST, WARNS_PREEMPTED, SlurmFacts, read_slurm
from strategies.units import GIB, format_bytes

# NCCL's and the data loaders' shared memory; a container has 64 MiB unless told otherwise.
_SHARED_MEMORY_BYTES = GIB
_DISK_BYTES = 10 * GIB
# Ranks, loader workers and their pipes: 1024, the usual soft limit, is reached with 8 ranks of 16 workers.
_OPEN_FILES = 4096
_PROCESSES = 4096
# A driver that hangs must not take the doctor with it; CUDA and 56 links take seconds.
_GPU_TIMEOUT_S = 90.0
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
    """Driver, CUDA, NCCL and every GPU with the links between them; where there is none, the CPU."""
    if has_nvidia_driver():
        facts = probe_gpus(_GPU_TIMEOUT_S)
        yield from gpu_findings(facts)
        if facts.gpus:
            return
    from launcher.hardware.devices import detect_hardware

    device = detect_hardware("auto", 0).device
    found = f"{device.name}, {format_bytes(device.memory_bytes)}, native: {', '.join(device.native_dtypes)}"
    if device.kind == "cpu":
        yield Finding("device", "warning", found, "no GPU is in use: fine for debugging")
    else:
        yield Finding(f"{device.kind} {device.index}", "ok", found)


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
    found = f"{format_bytes(free)} free at {path}"
    return Finding(name, "ok", found) if free >= wanted else Finding(name, "warning", found, advice)


def check_limits() -> Iterator[Finding]:
    """How many files and processes a rank may have, and how much memory it may pin."""
    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield processes_finding(*resource.getrlimit(resource.RLIMIT_NPROC))
    yield locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_infiniband=bool(read_ports()))


def processes_finding(soft: int, hard: int) -> Finding:
    """The limit of processes and threads of this user; -1 is none."""
    return _limit_finding("processes", f"{_amount(soft)} processes and threads", "u", _PROCESSES, soft, hard)


def locked_memory_finding(soft: int, *, has_infiniband: bool) -> Finding:
    """The limit of memory that may be pinned, which InfiniBand registers its buffers with; -1 is none."""
    found = "unlimited locked memory" if soft == resource.RLIM_INFINITY else f"{format_bytes(soft)} of locked memory"
    if soft == resource.RLIM_INFINITY or not has_infiniband:
        return Finding("locked memory", "ok", found)
    advice = "NCCL's InfiniBand needs it unlimited: ulimit -l unlimited, or limits.conf and slurmd's LimitMEMLOCK"
    return Finding("locked memory", "failure", found, advice)


def open_files_finding(soft: int, hard: int) -> Finding:
    """The limit of open files; -1 is none."""
    return _limit_finding("open files", f"{_amount(soft)} open files", "n", _OPEN_FILES, soft, hard)


def _limit_finding(name: str, found: str, letter: str, wanted: int, soft: int, hard: int) -> Finding:
    """A limit that `ulimit -LETTER` raises, as far as the hard one lets it."""
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return Finding(name, "ok", found)
    raised = hard == resource.RLIM_INFINITY or hard >= wanted
    advice = f"ulimit -{letter} {wanted}" if raised else f"ask for a hard limit of {wanted} (limits.conf); it is {hard}"
    return Finding(name, "warning", found, advice)


def _amount(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def check_wandb() -> Iterator[Finding]:
    """W&B's key, and its server if there is one."""
    from launcher.config.schema import WandbOptions
    from launcher.loggers.wandb_settings import resolve_mode

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
    """The cluster's version, accounting and partitions, where there is a cluster."""
    if shutil.which("sinfo") is None:
        yield Finding("SLURM", "ok", "no sinfo here: not a cluster's login node")
        return
    try:
        partitions = read_partitions()
    except PartitionsError as error:
        yield Finding("SLURM", "failure", str(error), "ask the cluster's people, or try again in a minute")
        return
    yield from slurm_findings(read_slurm())
    if not partitions:
        yield Finding("SLURM", "warning", "sinfo lists no partition", "you may submit to none: ask for an account")
    for partition in partitions:
        found = (
            f"{partition.name}: {partition.nodes} nodes, {partition.gpus_per_node} GPUs each, {partition.time_limit}"
        )
        if partition.is_up:
            yield Finding("SLURM", "ok", found)
        else:
            yield Finding("SLURM", "warning", f"{found}, down", "jobs do not start there")


def slurm_findings(facts: SlurmFacts) -> Iterator[Finding]:
    """Version and accounting of a cluster."""
    version = ".".join(map(str, facts.version)) or "of unknown version"
    if facts.version and facts.version < OLDEST:
        yield Finding("SLURM", "failure", version, "it knows no --gpus-per-node: 19.05 or later is needed")
    elif facts.version and facts.version < WARNS_PREEMPTED:
        advice = "it cannot warn a job that is preempted (22.05 can): save often, checkpoint.every_n_steps"
        yield Finding("SLURM", "warning", version, advice)
    else:
        yield Finding("SLURM", "ok", version)
    if facts.accounting:
        advice = "`launcher status` asks squeue alone, which forgets a job minutes after its end"
        yield Finding("accounting", "warning", facts.accounting, advice)
    else:
        yield Finding("accounting", "ok", "sacct answers")


# What is to be looked at on every node; the rest is the login node's.
NODE_CHECKS: tuple[Check, ...] = (
    check_versions,
    check_devices,
    check_compiler,
    check_memory_and_disk,
    check_limits,
    check_hostname,
    check_interfaces,
)
CHECKS: tuple[Check, ...] = (*NODE_CHECKS, check_wandb, check_slurm)
