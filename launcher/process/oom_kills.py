"""Counts the kernel's OOM kills: the exit code of a process does not show them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def oom_kill_counters(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[Path, ...]:
    """The files that count OOM kills: those of this process's cgroups (v1 or v2), then the machine's."""
    found: list[Path] = []
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            # In a container the path is that of the host, and the container's files are at the mount point.
            found += [cgroups / inside / "memory.events", cgroups / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [cgroups / "memory" / inside / "memory.oom_control", cgroups / "memory/memory.oom_control"]
    found.append(proc / "vmstat")
    return tuple(dict.fromkeys(path for path in found if path.is_file()))


def count_oom_kills(counters: Iterable[Path]) -> int:
    """The sum of the `oom_kill` lines; it rises with each kill."""
    total = 0
    for path in counters:
        try:
            lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
            total += sum(int(fields[1]) for fields in lines if len(fields) == 2 and fields[0] == "oom_kill")
        except (OSError, ValueError):
            continue  # a cgroup is removed after its last process
    return total
