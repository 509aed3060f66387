"""The version of SLURM and the state of its accounting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TIMEOUT_S = 10.0
# Since 19.05 there is --gpus-per-node; since 22.05 preempt_send_user_signal, which warns a preempted job.
OLDEST = (19, 5)
WARNS_PREEMPTED = (22, 5)


@dataclass(frozen=True, slots=True)
class SlurmFacts:
    """SLURM on a login node: its version, empty if unknown, and the error of `sacct`, empty if it answers."""

    version: tuple[int, ...]
    accounting: str


def read_slurm(run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]] | None = None) -> SlurmFacts:
    """Ask `sinfo` and `sacct`; `run` runs a command and raises as `subprocess.run` does."""
    run = run or _run
    try:
        version = parse_version(run(["sinfo", "--version"]).stdout)
    except (OSError, subprocess.TimeoutExpired):
        version = ()
    return SlurmFacts(version, _accounting(run))


def parse_version(text: str) -> tuple[int, ...]:
    """Read (22, 5, 8) from 'slurm-wlm 22.05.8'."""
    found = re.search(r"\b(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in found.groups() if part is not None) if found else ()


def _accounting(run: Callable[[Sequence[str]], subprocess.CompletedProcess[str]]) -> str:
    try:
        asked = run(["sacct", "--noheader", "--allocations", "--starttime=now", "--format=jobid"])
    except FileNotFoundError:
        return "sacct is not installed"
    except subprocess.TimeoutExpired as error:
        return f"sacct did not answer within {error.timeout:g} s"
    except OSError as error:
        return f"sacct could not be run: {error}"
    if asked.returncode:
        return (asked.stderr or asked.stdout).strip() or f"sacct ended with exit code {asked.returncode}"
    return ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
