"""A Linux control group with a memory limit, of either version of the interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOTS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak", "memory.events"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
)


class NoMemoryGroupError(Exception):
    """No group with a limit can be created; has the reason for each version."""


@dataclass(frozen=True)
class MemoryGroup:
    """One group: pages that its processes touch after they enter count.

    Attributes:
        path: the group's folder, for `cgroup.procs`.
        peak_file: contains the peak bytes.
        events_file: counts the processes that the kernel killed for it.
    """

    path: Path
    peak_file: str
    events_file: str

    def enter(self) -> None:
        """Move this process with all its threads into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """The peak bytes."""
        return int((self.path / self.peak_file).read_text())

    def killed(self) -> int:
        """Processes that the kernel killed because the group was full."""
        pairs = (line.split() for line in (self.path / self.events_file).read_text().splitlines())
        return next((int(value) for name, value in pairs if name == "oom_kill"), 0)


@contextmanager
def memory_group(name: str, limit_bytes: int | None) -> Iterator[MemoryGroup]:
    """A new group, removed afterwards; all its processes must have ended by then.

    Args:
        name: unique name of the folder.
        limit_bytes: above it the kernel kills a process of the group; None for no limit.

    Raises:
        NoMemoryGroupError: the kernel has no control groups, or this user may not create one.
    """
    tried: list[str] = []
    for root, limit, peak, events in _ROOTS:
        path = root / name
        try:
            path.mkdir()
        except OSError as error:
            tried.append(str(error))
            continue
        try:
            # The file exists only in a control group with the memory controller.
            if (path / limit).exists():
                if limit_bytes is not None:
                    (path / limit).write_text(str(limit_bytes))
                yield MemoryGroup(path, peak, events)
                return
            tried.append(f"no {limit} in {root}")
        finally:
            path.rmdir()
    raise NoMemoryGroupError(f"no control group with a limit can be made here: {'; '.join(tried)}")
