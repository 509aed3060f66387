"""When this launch began, for the time that a run needs to start."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Set by the agent for its ranks: when its own process began, in seconds since the epoch.
VARIABLE = "LAUNCHER_LAUNCHED"
# Position of the start time after the name of the program in /proc/<pid>/stat.
_START_FIELD = 19


def find_process_start(pid: int) -> float | None:
    """When a process began, in seconds since the epoch, to a hundredth; None on a system without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time() - max(age, 0.0)


def mark_launch(env: MutableMapping[str, str]) -> None:
    """Let the ranks that inherit this environment know when this process, their agent, began."""
    env[VARIABLE] = f"{find_process_start(os.getpid()) or time.time():.3f}"


def read_launch(env: Mapping[str, str]) -> float | None:
    """When the agent of this rank began, in seconds since the epoch; None without an agent."""
    try:
        return float(env[VARIABLE])
    except (KeyError, ValueError):
        return None
