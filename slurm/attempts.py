"""The attempts of one job, and whether another requeue can help."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "attempts.jsonl"
# Each checkpoint has a manifest with its optimizer step.
_MANIFESTS = "checkpoints/*.manifest"
_EVENTS = "events.jsonl"
# The last line of the events is in this many bytes.
_TAIL = 65_536


@dataclass(frozen=True, slots=True)
class SlurmAttempt:
    """One start of a job on its nodes.

    Attributes:
        job_id: SLURM's number, the same for all attempts of a requeued job.
        number: requeues of the job before this attempt.
        step: the optimizer step that the attempt continues from.
        time: start, seconds since 1970.
        host: of the first node.
    """

    job_id: str
    number: int
    step: int
    time: float
    host: str


def count_fruitless(attempts: Sequence[SlurmAttempt], job_id: str, step: int) -> int:
    """The number of the job's latest attempts in a row that saved nothing beyond `step`. Pure."""
    newest_first = reversed([attempt for attempt in attempts if attempt.job_id == job_id])
    return sum(1 for _ in itertools.takewhile(lambda attempt: attempt.step >= step, newest_first))


def record_attempt(folder: Path, job_id: str, number: int, step: int, host: str) -> None:
    """Record the start of an attempt."""
    line = json.dumps(asdict(SlurmAttempt(job_id, number, step, round(time.time(), 3), host))) + "\n"
    descriptor = os.open(folder / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_attempts(folder: Path) -> list[SlurmAttempt]:
    """The attempts recorded in a folder, oldest first; incomplete lines are skipped."""
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


def read_saved_step(run: Path) -> int:
    """The optimizer step of a run's newest checkpoint; 0 without one."""
    return max((_read_step(file) for file in run.glob(_MANIFESTS)), default=0)


def read_missing_nodes(run: Path, since: float) -> tuple[int, ...]:
    """Numbers of the nodes that did not join the attempt since `since`, if that is the run's last event."""
    try:
        with (run / _EVENTS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
        event: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if event.get("kind") != "nodes_missing" or event["time"] < since:
            return ()
        return tuple(int(node) for node in event["nodes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def _read_step(file: Path) -> int:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return int(content["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0
