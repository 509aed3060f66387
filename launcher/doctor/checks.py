"""The checks of `launcher doctor`: facts of this machine, and the limits below which they are a problem."""

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

from launcher.core.distribution import DISTRIBUTION
from launcher.doctor.finding import Check, Finding, judge
from launcher.doctor.gpus import gpu_findings, has_nvidia_driver, probe_gpus
from launcher.doctor.network import check_hostname, check_interfaces, read_ports
from slurm.partitions import PartitionsError, read_partitions
from slurm.version import OLDEST, WARNS_PREEMPTED, SlurmFacts, read_slurm
from strategies.units import GIB, format_bytes

# For NCCL and the data loaders; a container has 64 MiB by default.
_SHARED_MEMORY_BYTES = GIB
_DISK_BYTES = 10 * GIB
# Ranks, loader workers and their pipes: 8 ranks of 16 workers reach 1024, the usual soft limit.
_OPEN_FILES = 4096
_PROCESSES = 4096
# A driver may hang; CUDA and 56 links take seconds.
_GPU_TIMEOUT_S = 90.0
_WANDB_TIMEOUT_S = 5.0


def check_versions() -> Iterator[Finding]:
    """Python and every required library, compared with the tested versions."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield judge("python", sys.version_info >= (3, 11), python, "install Python 3.11 or newer", "failure")
    try:
        texts = importlib.metadata.requires(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        advice = f"pip install -e {Path(__file__).resolve().parents[2]}"
        yield Finding(DISTRIBUTION, "warning", "not installed, so its libraries are not checked", advice)
        return
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield version_finding(requirement)


def check_command() -> Iterator[Finding]:
    """Whether another distribution has overwritten the command `launcher`."""
    try:
        version = importlib.metadata.version("launcher")
    except importlib.metadata.PackageNotFoundError:
        return
    found = f"the package 'launcher' {version} is installed too; its command has the same name"
    advice = f"pip uninstall launcher, then reinstall {DISTRIBUTION} (pip install --force-reinstall --no-deps)"
    yield Finding("command launcher", "warning", found, advice)


def version_finding(requirement: Requirement) -> Finding:
    """One library, compared with the versions that are known to work."""
    advice = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "failure", "not installed", advice)
    is_known = requirement.specifier.contains(version, prereleases=True)
    found = version if is_known else f"{version}; known to work: {requirement.specifier}"
    return judge(requirement.name, is_known, found, advice, "failure")


def check_devices() -> Iterator[Finding]:
    """Driver, CUDA, NCCL, every GPU and the links between them; without a GPU, the CPU."""
    if has_nvidia_driver():
        facts = probe_gpus(_GPU_TIMEOUT_S)
        yield from gpu_findings(facts)
        if facts.gpus:
            return
    from launcher.hardware.devices import detect_hardware

    device = detect_hardware("auto", 0).device
    found = f"{device.name}, {format_bytes(device.memory_bytes)}, native: {', '.join(device.native_dtypes)}"
    if device.kind == "cpu":
        yield Finding("device", "warning", found, "no GPU found: enough for debugging")
    else:
        yield Finding(f"{device.kind} {device.index}", "ok", found)


def check_compiler() -> Iterator[Finding]:
    """The tools that DeepSpeed builds its extensions with."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    advice = "DeepSpeed needs it to build its CPU Adam: apt-get install g++"
    yield judge("C++ compiler", compiler is not None, compiler or "no g++", advice)
    # pip installs it next to Python, which may not be on PATH.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    advice = "DeepSpeed needs it to build extensions: pip install ninja"
    yield judge("ninja", ninja is not None, ninja or "not found", advice)


def check_fsdp() -> Iterator[Finding]:
    """Whether torch has FSDP2, and the backends that carry its parameters and gradients."""
    version = importlib.metadata.version("torch")
    try:
        from torch import cuda
        from torch import distributed as dist
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor
    except ImportError as error:
        found = f"torch {version} cannot shard: {error}"
        yield Finding("FSDP2", "failure", found, "pip install 'torch>=2.10', in a build with torch.distributed")
        return
    available = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    backends = [name for name, is_there in available.items() if is_there]
    found = f"{fully_shard.__name__} and {DTensor.__name__} of torch {version}, over {' and '.join(backends) or 'none'}"
    needed = "nccl" if cuda.is_available() else "gloo"
    yield judge("FSDP2", needed in backends, found, f"install a build of torch with {needed}", "failure")


def check_memory_and_disk() -> Iterator[Finding]:
    """Free shared memory, and free space for runs."""
    yield space_finding("shared memory", "/dev/shm", _SHARED_MEMORY_BYTES, "docker run --shm-size=8g, or --ipc=host")  # noqa: S108 -- only its size is read
    advice = "set runs_dir to a larger disk: checkpoints are written there"
    yield space_finding("disk", str(Path.cwd()), _DISK_BYTES, advice)


def space_finding(name: str, path: str, wanted: int, advice: str) -> Finding:
    """Free space at `path`, compared with `wanted` bytes."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, "warning", f"{path}: {error.strerror or error}", advice)
    return judge(name, free >= wanted, f"{format_bytes(free)} free at {path}", advice)


def check_limits() -> Iterator[Finding]:
    """Limits of open files, processes and pinned memory."""
    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield processes_finding(*resource.getrlimit(resource.RLIMIT_NPROC))
    yield locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_infiniband=bool(read_ports()))


def processes_finding(soft: int, hard: int) -> Finding:
    """The limit of processes and threads of this user; -1 is unlimited."""
    return _limit_finding("processes", "processes and threads", "u", _PROCESSES, soft, hard)


def locked_memory_finding(soft: int, *, has_infiniband: bool) -> Finding:
    """The limit of pinned memory, which InfiniBand needs for its buffers; -1 is unlimited."""
    is_unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited locked memory" if is_unlimited else f"{format_bytes(soft)} of locked memory"
    advice = "NCCL needs it unlimited for InfiniBand: ulimit -l unlimited, or limits.conf and LimitMEMLOCK of slurmd"
    return judge("locked memory", is_unlimited or not has_infiniband, found, advice, "failure")


def open_files_finding(soft: int, hard: int) -> Finding:
    """The limit of open files; -1 is unlimited."""
    return _limit_finding("open files", "open files", "n", _OPEN_FILES, soft, hard)


def _limit_finding(name: str, noun: str, letter: str, wanted: int, soft: int, hard: int) -> Finding:
    """A limit that `ulimit -LETTER` raises, up to the hard limit."""
    is_unlimited = soft == resource.RLIM_INFINITY
    advice = f"ulimit -{letter} {wanted}"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        advice = f"ask the administrator for a hard limit of {wanted} (limits.conf); it is {hard}"
    found = f"{'unlimited' if is_unlimited else soft} {noun}"
    return judge(name, is_unlimited or soft >= wanted, found, advice)


def check_wandb() -> Iterator[Finding]:
    """The key of W&B and, with a key, its server."""
    from launcher.config.schema import WandbOptions
    from launcher.loggers.wandb_settings import resolve_mode

    mode, remark = resolve_mode(WandbOptions(), os.environ)
    if remark is not None:
        yield Finding("W&B", "warning", remark, "without it, runs stay in their folders for `wandb sync`")
    elif mode != "online":
        yield Finding("W&B", "ok", f"WANDB_MODE={mode}")
    else:
        yield reach_finding(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def reach_finding(url: str) -> Finding:
    """Whether the server of W&B answers, with any status."""
    if not url.startswith(("http://", "https://")):
        return Finding("W&B", "failure", f"WANDB_BASE_URL={url!r} is not a web address", "start it with https://")
    try:
        urllib.request.urlopen(url, timeout=_WANDB_TIMEOUT_S).close()  # noqa: S310 -- http and https only
    except urllib.error.HTTPError as error:
        error.close()  # it answered
    except OSError as error:
        advice = "runs switch to offline after wandb.init_timeout: check the proxy, or set wandb.mode: offline"
        return Finding("W&B", "warning", f"a key is set, but {url} does not answer: {error}", advice)
    return Finding("W&B", "ok", f"a key is set, and {url} answers")


def check_slurm() -> Iterator[Finding]:
    """Version, accounting and partitions of the cluster, if there is one."""
    if shutil.which("sinfo") is None:
        yield Finding("SLURM", "ok", "no sinfo: this is not a login node of a cluster")
        return
    try:
        partitions = read_partitions()
    except PartitionsError as error:
        yield Finding("SLURM", "failure", str(error), "try again in a minute, or ask the administrators of the cluster")
        return
    yield from slurm_findings(read_slurm())
    if not partitions:
        advice = "you cannot submit to any partition: ask for an account"
        yield Finding("SLURM", "warning", "sinfo lists no partition", advice)
    for p in partitions:
        found = f"{p.name}: {p.nodes} nodes, {p.gpus_per_node} GPUs each, {p.time_limit}"
        yield judge("SLURM", p.is_up, found if p.is_up else f"{found}, down", "jobs do not start in it")


def slurm_findings(facts: SlurmFacts) -> Iterator[Finding]:
    """Version and accounting of a cluster."""
    version = ".".join(map(str, facts.version)) or "of unknown version"
    if facts.version and facts.version < OLDEST:
        yield Finding("SLURM", "failure", version, "it has no --gpus-per-node: update SLURM to 19.05 or later")
    elif facts.version and facts.version < WARNS_PREEMPTED:
        advice = "it does not signal a job before preemption (22.05 does): save often with checkpoint.every_n_steps"
        yield Finding("SLURM", "warning", version, advice)
    else:
        yield Finding("SLURM", "ok", version)
    advice = "`launcher status` can only ask squeue, which forgets a job minutes after its end"
    yield judge("accounting", not facts.accounting, facts.accounting or "sacct answers", advice)


# Run on every node; the others only on the login node.
NODE_CHECKS: tuple[Check, ...] = (
    check_versions,
    check_command,
    check_devices,
    check_compiler,
    check_fsdp,
    check_memory_and_disk,
    check_limits,
    check_hostname,
    check_interfaces,
)
CHECKS: tuple[Check, ...] = (*NODE_CHECKS, check_wandb, check_slurm)
