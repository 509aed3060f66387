"""What the kernel knows about a rank's processes: their state, what they wait for, and whether they do anything."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

# A rank is busy if its processes use at least this share of a processor, or read and write this many bytes a second.
_BUSY_SHARE = 0.05
_BUSY_BYTES = 100_000
# Parts of the kernel's wait channels, and what a process waits for in them. The first one that fits counts.
_CHANNELS = (
    ("nanosleep", "sleeping"),
    ("pipe", "waiting for the other end of a pipe"),
    ("wait_for_partner", "waiting for the other end of a pipe"),
    ("do_wait", "waiting for a child process"),
    ("lock_file", "waiting for a file lock"),
    ("flock", "waiting for a file lock"),
    ("posix_lock", "waiting for a file lock"),
    ("locks_lock", "waiting for a file lock"),
    ("rpc", "waiting for a network disk"),
    ("nfs", "waiting for a network disk"),
    ("fuse", "waiting for a network disk"),
    ("io_schedule", "waiting for a disk"),
    ("folio", "waiting for a disk"),
    ("balance_dirty", "waiting for a disk"),
    ("jbd2", "waiting for a disk"),
    ("sk_", "waiting for the network"),
    ("inet_", "waiting for the network"),
    ("tcp_", "waiting for the network"),
    ("unix_", "waiting for another process"),
    ("futex", "waiting for a lock"),
    ("poll", "waiting for input"),
    ("select", "waiting for input"),
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a rank have used: processor seconds, and bytes read and written."""

    cpu: float
    transferred: int

    def is_busy_since(self, earlier: Usage, seconds: float) -> bool:
        """Whether they have done anything in the `seconds` since an earlier reading."""
        return (
            self.cpu - earlier.cpu >= _BUSY_SHARE * seconds
            or self.transferred - earlier.transferred >= _BUSY_BYTES * seconds
        )


def read_usage(pid: int) -> Usage:
    """The usage of a process and its descendants, such as loader workers; those that have ended are left out."""
    import psutil  # only a hang needs it, not a start

    cpu, transferred = 0.0, 0
    try:
        process = psutil.Process(pid)
        found = [process, *process.children(recursive=True)]
    except psutil.Error:
        found = []
    for each in found:
        with contextlib.suppress(psutil.Error, AttributeError):
            times = each.cpu_times()
            cpu += times.user + times.system
            counters = each.io_counters()
            transferred += counters.read_chars + counters.write_chars
    return Usage(cpu, transferred)


def read_process_status(pid: int) -> str:
    """State of a process by psutil's name, such as 'running' or 'stopped'; 'dead' if it does not exist."""
    import psutil

    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def is_stopped(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether a signal has stopped the process, at a tenth of the cost of `read_process_status`."""
    try:
        # The name of the program, in brackets, may have any content.
        return (proc / str(pid) / "stat").read_bytes().rpartition(b") ")[2][:1] == b"T"
    except OSError:
        return False


def read_wait_channel(pid: int, proc: Path = Path("/proc")) -> str:
    """The kernel's function in which the main thread waits; empty if it runs, or the kernel does not show it."""
    try:
        channel = (proc / str(pid) / "wchan").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return "" if channel == "0" else channel


def describe_wait_channel(channel: str) -> str:
    """What a process waits for in this function of the kernel; empty if not known."""
    return next((text for part, text in _CHANNELS if part in channel), "")
