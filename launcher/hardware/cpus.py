"""CPU cores that this process may use; taskset, SLURM, Docker and Kubernetes limit them."""

from __future__ import annotations

import os
from pathlib import Path


def count_usable_cpus(proc: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores in the affinity mask, or in the quota of the control group if that is less; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(proc, cgroups)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _quota(proc: Path, cgroups: Path) -> float | None:
    """The strictest quota of the control groups above this process, in cores; None without a limit."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None  # not Linux
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        # In a container the path may be the host's and not exist; the root is then the container's.
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            quota = _version_1(folder) if controllers else _version_2(folder)
            if quota is not None:
                found.append(quota)
            if folder == root:
                break
    return min(found, default=None)


def _version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _version_1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
