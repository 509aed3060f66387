"""A run in the background of this machine, for users without SLURM.

Process start times come from /proc and not from psutil, which computes them from the clock: after a correction of the
clock a recorded time would no longer match.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.core.errors import QueueError

OUTPUT = "output.log"


def start_detached(command: Sequence[str], cwd: Path, folder: Path) -> dict[str, Any]:
    """Start a process that outlives this one and its terminal; its output goes to a file in `folder`.

    Returns:
        `pid` and `started`, which identify it even if its number is used again.

    Raises:
        QueueError: it cannot be started.
    """
    try:
        descriptor = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as output:
            process = subprocess.Popen(
                list(command), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    except OSError as error:
        raise QueueError(
            f"{command[0]} cannot be started in {cwd}: {error.strerror or error}; check that this folder and the "
            "environment exist"
        ) from error
    # This process ends without waiting for it; a return code keeps Popen from warning.
    process.returncode = 0
    return {"pid": process.pid, "started": start_time(process.pid)}


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    # The state is field 3 of the file and the start time field 22; a zombie has ended.
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(pid: int, started: int | None) -> bool:
    """Whether the process with this number and start time still runs."""
    return started is not None and start_time(pid) == started


def request_stop(pid: int, started: int | None) -> bool:
    """Send SIGTERM, after which a run saves and ends; False if the process has ended already."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # Checked after the open: the descriptor stays with one process, the number does not.
        if not is_running(pid, started):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True
