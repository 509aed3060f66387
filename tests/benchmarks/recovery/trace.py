"""What a training writes for the benchmark: a line for each batch, and digests of the final states.

The folder is the environment variable RECOVERY_TRACE. Rank r appends to `rank-r`:
`when pid attempt epoch batch finished loss`, where `when` is the system's monotonic clock in seconds, the same in all
processes, `attempt` numbers the process groups of this process, `finished` is 1 if the batch ended an optimizer step,
and the loss is in hexadecimal, so that equal means equal to the bit. Rank r's final states are in `final-r.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = "RECOVERY_TRACE"


@dataclass(frozen=True)
class Line:
    """A finished batch of one rank."""

    when: float
    pid: int
    attempt: int
    epoch: int
    batch: int
    finished: bool
    loss: str

    @property
    def at(self) -> tuple[int, int]:
        """The position in the training."""
        return self.epoch, self.batch


def folder() -> Path:
    return Path(os.environ[FOLDER])


def append(rank: int, attempt: int, at: tuple[int, int], *, finished: bool, loss: float) -> None:
    """Add a line in one write, so that a killed process leaves no part of one."""
    line = f"{time.monotonic():.6f} {os.getpid()} {attempt} {at[0]} {at[1]} {int(finished)} {float(loss).hex()}\n"
    descriptor = os.open(folder() / f"rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(trace: Path, rank: int) -> list[Line]:
    """The lines of a rank so far."""
    try:
        text = (trace / f"rank-{rank}").read_text()
    except FileNotFoundError:
        return []
    lines = []
    for row in text.splitlines():
        when, pid, attempt, epoch, batch, finished, loss = row.split()
        lines.append(Line(float(when), int(pid), int(attempt), int(epoch), int(batch), finished == "1", loss))
    return lines


def digest(value: Any) -> str:
    """SHA-256 of tensors, numbers and texts in nested containers."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        found.update(value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            found.update(repr(key).encode())
            _feed(found, value[key])
    elif isinstance(value, (list, tuple)):
        found.update(f"{len(value)}(".encode())
        for part in value:
            _feed(found, part)
    else:
        found.update(repr(value).encode())


def generators() -> list[Any]:
    """States of the random generators of this process."""
    return [torch.get_rng_state(), random.getstate(), list(np.random.get_state())]


def write_final(rank: int, states: Mapping[str, Any]) -> None:
    """Write the digests of the final states, of each entry of a mapping, complete or not at all."""
    path = folder() / f"final-{rank}.json"
    part = path.with_suffix(".part")
    digests = {
        name: {str(key): digest(entry) for key, entry in value.items()} if isinstance(value, Mapping) else digest(value)
        for name, value in states.items()
    }
    part.write_text(json.dumps(digests))
    part.rename(path)
