"""Free memory of this machine, or of the control group that holds this process."""

from __future__ import annotations

from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def available_memory(proc: Path = Path("/proc"), groups: Path = _GROUPS) -> int | None:
    """Bytes that this process can still use without swapping; None if not known, as on other systems than Linux."""
    sizes = (_of_machine(proc / "meminfo"), _of_group(proc / "self" / "cgroup", groups))
    found = [size for size in sizes if size is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _of_group(own: Path, groups: Path) -> int | None:
    """Of a group of version 2 with a limit; pages of files count as free, as the kernel gives them up."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
        name = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        folder = groups / name.lstrip("/")
        limit, used = (int((folder / f"memory.{what}").read_text()) for what in ("max", "current"))
        values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(limit - used + int(values.get("file", 0)), 0)
    except (OSError, StopIteration, ValueError):  # no group, or a limit of "max"
        return None
