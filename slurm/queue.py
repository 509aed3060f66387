"""What SLURM says of a job, and ending one: `squeue`, `sacct` and `scancel`, started without a shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_TIMEOUT = 60.0
# States after which nothing more comes of a job.
ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED",
                   "TIMEOUT"})  # fmt: skip
UNKNOWN = "UNKNOWN"


class QueueCommandError(RuntimeError):
    """A command of SLURM's is missing, failed, or did not answer; carries its own words."""


@dataclass(frozen=True, slots=True)
class JobState:
    """How a job stands.

    Attributes:
        state: SLURM's word, as in RUNNING, PENDING, REQUEUED, COMPLETED; UNKNOWN if SLURM has forgotten it.
        reason: why it waits, or its nodes.
        exit_code: of an ended job, None where it is not known.
    """

    state: str
    reason: str = ""
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in ENDED or self.state == UNKNOWN


def has_slurm() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def job_state(job_id: str) -> JobState:
    """Ask the controller, and the accounting for what the controller no longer knows.

    Raises:
        QueueCommandError: neither answers.
    """
    _check_id(job_id)
    asked = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%R"])
    lines = asked.stdout.strip().splitlines() if asked.returncode == 0 else []
    if lines:
        state, _, reason = lines[0].partition("|")
        if state not in ENDED:
            return JobState(state, reason)
    elif asked.returncode and "Invalid job id" not in asked.stderr:
        raise QueueCommandError(f"squeue: {asked.stderr.strip() or 'no answer'}")
    return _accounted(job_id) or (JobState(lines[0].partition("|")[0]) if lines else JobState(UNKNOWN))


def array_states(job_id: str) -> dict[int, JobState]:
    """The same for every member of a job array, by its index, asked once for all; without what SLURM has forgotten.

    Raises:
        QueueCommandError: neither answers.
    """
    _check_id(job_id)
    words = ["squeue", "--noheader", "--states=all", "--array", f"--jobs={job_id}", "--format=%i|%T|%R"]
    asked = _run(words)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise QueueCommandError(f"squeue: {asked.stderr.strip() or 'no answer'}")
    states: dict[int, JobState] = {}
    for line in asked.stdout.splitlines() if asked.returncode == 0 else ():
        name, state, reason = [*line.strip().split("|", 2), "", ""][:3]
        for index in _indices(name, job_id):
            states[index] = JobState(state, reason)
    if not states or any(state.state in ENDED for state in states.values()):
        for name, state in _accounted_rows(job_id):
            for index in _indices(name, job_id):
                # A requeued member is the controller's to tell.
                if index not in states or states[index].state in ENDED:
                    states[index] = state
    return states


def max_array_size() -> int | None:
    """The cluster's MaxArraySize: the first index that no array may have. None where SLURM does not say."""
    try:
        asked = _run(["scontrol", "show", "config"])
    except QueueCommandError:
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", asked.stdout, re.MULTILINE)
    return None if asked.returncode or found is None else int(found[1])


def cancel_job(job_id: str) -> None:
    """End a job, an array or one member of it, queued or running.

    Raises:
        QueueCommandError: SLURM's own words.
    """
    _check_id(job_id)
    asked = _run(["scancel", job_id])
    if asked.returncode:
        raise QueueCommandError(f"scancel: {asked.stderr.strip()}")


def requeue_job(job_id: str) -> None:
    """Put a running job, or one member of an array, back into the queue; its processes are ended.

    Raises:
        QueueCommandError: SLURM's own words.
    """
    _check_id(job_id)
    asked = _run(["scontrol", "requeue", job_id])
    if asked.returncode:
        raise QueueCommandError(f"scontrol requeue: {asked.stderr.strip()}")


def cancel_step(job_id: str, step: str | None) -> None:
    """End all tasks of one step of a job.

    Raises:
        QueueCommandError: SLURM's own words.
    """
    _check_id(job_id)
    if step is None or not step.isdecimal():
        raise QueueCommandError(f"{step!r} is no number of a step")
    asked = _run(["scancel", f"{job_id}.{step}"])
    if asked.returncode:
        raise QueueCommandError(f"scancel: {asked.stderr.strip()}")


def _accounted(job_id: str) -> JobState | None:
    rows = _accounted_rows(job_id)
    return rows[-1][1] if rows else None


def _accounted_rows(job_id: str) -> list[tuple[str, JobState]]:
    """What the accounting says: each job's, or member's, number and state; nothing on a cluster without accounting."""
    if shutil.which("sacct") is None:
        return []
    words = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}",
             "--format=State,ExitCode,NodeList,JobID"]  # fmt: skip
    asked = _run(words)
    if asked.returncode:
        return []
    rows: list[tuple[str, JobState]] = []
    for line in asked.stdout.strip().splitlines():
        state, code, nodes, name = [*line.split("|"), "", "", "", ""][:4]
        found = re.match(r"(\d+):(\d+)", code)
        exit_code = None if found is None else int(found[1]) or (128 + int(found[2]) if int(found[2]) else 0)
        # "CANCELLED by 1000"
        rows.append((name, JobState(state.split()[0] if state else UNKNOWN, nodes, exit_code)))
    return rows


def _indices(name: str, job_id: str) -> list[int]:
    """The members that a line is about: `42_7`, or `42_[8,10-12%2]` of those that wait together."""
    found = re.fullmatch(rf"{job_id}_(?:(\d+)|\[([\d,:-]+)(?:%\d+)?\])", name, re.ASCII)
    if found is None:
        return []
    if found[1] is not None:
        return [int(found[1])]
    indices: list[int] = []
    for part in found[2].split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        indices += range(int(first), int(last or first) + 1, int(step or 1))
    return indices


def _check_id(job_id: str) -> None:
    if not re.fullmatch(r"\d+(_\d+)?", job_id, re.ASCII):
        raise QueueCommandError(f"{job_id!r} is no job number")


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except FileNotFoundError:
        raise QueueCommandError(f"there is no {words[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise QueueCommandError(f"{words[0]} did not answer within {_TIMEOUT:g} s") from None
