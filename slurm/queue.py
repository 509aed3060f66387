"""SLURM's queue commands: `squeue`, `sacct`, `scancel` and `scontrol`, started without a shell.

The functions raise `QueueCommandError` if a command is missing, fails, or does not answer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.array import read_array

_TIMEOUT = 60.0
# Larger than any MaxArraySize.
_MAX_INDEX = 10**9
# States of jobs that will not run again.
ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                   "PREEMPTED", "REVOKED", "TIMEOUT"})  # fmt: skip
UNKNOWN = "UNKNOWN"


class QueueCommandError(RuntimeError):
    """A command of SLURM is missing, failed, or did not answer; with its own message."""


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job.

    Attributes:
        state: SLURM's name, such as RUNNING; UNKNOWN if SLURM no longer knows the job.
        reason: why the job waits, or its nodes.
        exit_code: of an ended job, if it is known.
    """

    state: str
    reason: str = ""
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the job will not run again."""
        return self.state in ENDED or self.state == UNKNOWN


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def read_job_state(job_id: str) -> JobState:
    """The state of a job, from the controller, or from the accounting if the controller no longer knows the job."""
    lines = _query_controller(job_id, "--format=%T|%R")
    state, _, reason = lines[0].partition("|") if lines else (UNKNOWN, "", "")
    if lines and state not in ENDED:
        return JobState(state, reason)
    rows = _query_accounting(job_id)
    return rows[-1][1] if rows else JobState(state)


def read_array_states(job_id: str) -> dict[int, JobState]:
    """The state of each member of a job array, by index; without members that SLURM no longer knows."""
    states: dict[int, JobState] = {}
    for line in _query_controller(job_id, "--array", "--format=%i|%T|%R"):
        name, state, reason = [*line.strip().split("|", 2), "", ""][:3]
        for index in _indices(name, job_id):
            states[index] = JobState(state, reason)
    if not states or any(state.state in ENDED for state in states.values()):
        for name, state in _query_accounting(job_id):
            for index in _indices(name, job_id):
                # For requeued members, the controller's state is the current one.
                if index not in states or states[index].state in ENDED:
                    states[index] = state
    return states


def read_max_array_size() -> int | None:
    """The cluster's MaxArraySize, which all array indices are below; None if SLURM does not report it."""
    try:
        done = _run(["scontrol", "show", "config"])
    except QueueCommandError:
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    return None if done.returncode or found is None else int(found[1])


def cancel_job(job_id: str) -> None:
    """Cancel a job, an array or one member of it, queued or running."""
    _check_id(job_id)
    _run_checked("scancel", [job_id])


def requeue_job(job_id: str) -> None:
    """Put a running job, or one member of an array, back into the queue; SLURM ends its processes."""
    _check_id(job_id)
    _run_checked("scontrol requeue", [job_id])


def cancel_step(job_id: str, step: str | None) -> None:
    """End all tasks of one step of a job."""
    _check_id(job_id)
    if step is None or not step.isdecimal():
        raise QueueCommandError(f"given step {step!r}; expected a number")
    _run_checked("scancel", [f"{job_id}.{step}"])


def _query_controller(job_id: str, *options: str) -> list[str]:
    """The lines of squeue; empty if the controller no longer knows the job."""
    _check_id(job_id)
    done = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", *options])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise QueueCommandError(f"squeue: {done.stderr.strip() or 'no answer'}")
    return [] if done.returncode else done.stdout.strip().splitlines()


def _query_accounting(job_id: str) -> list[tuple[str, JobState]]:
    """Id and state of each job or member in the accounting; empty on a cluster without accounting."""
    if shutil.which("sacct") is None:
        return []
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}",
                 "--format=State,ExitCode,NodeList,JobID"])  # fmt: skip
    if done.returncode:
        return []
    rows: list[tuple[str, JobState]] = []
    for line in done.stdout.strip().splitlines():
        state, code, nodes, name = [*line.split("|"), "", "", "", ""][:4]
        found = re.match(r"(\d+):(\d+)", code)
        exit_code = None if found is None else int(found[1]) or (128 + int(found[2]) if int(found[2]) else 0)
        # "CANCELLED by 1000"
        rows.append((name, JobState(state.split()[0] if state else UNKNOWN, nodes, exit_code)))
    return rows


def _indices(name: str, job_id: str) -> tuple[int, ...]:
    """The members in an id: `42_7`, or `42_[8,10-12%2]` for members that wait together."""
    found = re.fullmatch(rf"{job_id}_(?:(\d+)|\[([\d,:%-]+)\])", name, re.ASCII)
    return () if found is None else read_array(found[1] or found[2], _MAX_INDEX).indices


def _check_id(job_id: str) -> None:
    if not re.fullmatch(r"\d+(_\d+)?", job_id, re.ASCII):
        raise QueueCommandError(f"given job {job_id!r}; expected a number, as in 42 or 42_7")


def _run_checked(command: str, arguments: Sequence[str]) -> None:
    done = _run([*command.split(), *arguments])
    if done.returncode:
        raise QueueCommandError(f"{command}: {done.stderr.strip()}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except FileNotFoundError:
        raise QueueCommandError(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise QueueCommandError(f"{command[0]} did not answer within {_TIMEOUT:g} s") from None
