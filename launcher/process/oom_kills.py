"""Whether the kernel killed a process for memory: it says so only in counters that rise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def oom_kill_counters(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[Path, ...]:
    """The files that count kills for memory: this process's cgroups (either version), then the machine's."""
    found: list[Path] = []
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            # In a container the path is the host's, and the mount point is the container's own.
            found += [cgroups / inside / "memory.events", cgroups / "memory.events"]
        elif "memory" in controllers.split(","):
            found += [cgroups / "memory" / inside / "memory.oom_control", cgroups / "memory/memory.oom_control"]
    found.append(proc / "vmstat")
    return tuple(dict.fromkeys(path for path in found if path.is_file()))


def count_oom_kills(counters: Iterable[Path]) -> int:
    """The sum of the `oom_kill` lines: larger than before if the kernel killed since."""
    total = 0
    for path in counters:
        try:
            words = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
            total += sum(int(pair[1]) for pair in words if len(pair) == 2 and pair[0] == "oom_kill")
        except (OSError, ValueError):
            continue  # a cgroup may vanish with its last process
    return total
