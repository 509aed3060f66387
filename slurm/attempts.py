"""The attempts of one job, and when it is of no use to requeue it once more."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "attempts.jsonl"
# Each checkpoint has one of these beside it; it says the optimizer step.
_MANIFESTS = "checkpoints/*.manifest"


@dataclass(frozen=True, slots=True)
class SlurmAttempt:
    """One start of a job on its nodes.

    Attributes:
        job_id: SLURM's number, the same for all attempts of a requeued job.
        number: how often SLURM had requeued the job, 0 at first.
        step: the optimizer step that it goes on from.
        time: when it began, seconds since 1970.
        host: name of the first node.
    """

    job_id: str
    number: int
    step: int
    time: float
    host: str


def fruitless(attempts: Sequence[SlurmAttempt], job_id: str, step: int) -> int:
    """How many of the job's last attempts in a row have made no step that was saved. Pure.

    Args:
        attempts: oldest first, of any jobs.
        job_id: the job in question.
        step: the step that is saved now.
    """
    count = 0
    for attempt in reversed([a for a in attempts if a.job_id == job_id]):
        if attempt.step < step:
            break
        count += 1
    return count


def record_attempt(folder: Path, job_id: str, number: int, step: int, host: str) -> None:
    """Note that an attempt begins."""
    line = json.dumps(asdict(SlurmAttempt(job_id, number, step, round(time.time(), 3), host))) + "\n"
    descriptor = os.open(folder / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_attempts(folder: Path) -> list[SlurmAttempt]:
    """The attempts noted in a folder, oldest first; lines that were cut off are passed over."""
    found: list[SlurmAttempt] = []
    try:
        lines = (folder / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            found.append(SlurmAttempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def saved_step(run: Path) -> int:
    """The optimizer step of a run's newest checkpoint, 0 without one."""
    return max((_step(file) for file in run.glob(_MANIFESTS)), default=0)


def _step(file: Path) -> int:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return int(content["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0
