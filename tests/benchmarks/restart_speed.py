"""SIGKILL of a rank to the next optimizer step, all ranks restarted: many kills of one run, at random steps.

    python -m tests.benchmarks.restart_speed [--ranks 2] [--kills 12] [--pause 0.02] [--seed 0]

The toy saves a checkpoint in every step; W&B is off. Parts, from the events and from the marks of `launch_clock.py`:

- failed: SIGKILL to `rank_failed`, when the agent knows the cause;
- started: from there to `run_started` of the next attempt, when its ranks have a plan;
- step: from there to the end of the first optimizer step of the next attempt.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launcher.core.events import read_events
from tests.benchmarks.launch import running, wait_for_mark
from tests.benchmarks.launch_clock import read_marks

_TIMEOUT = 60.0
_PARTS = ("failed", "started", "step", "total")


def measure_kill(process: subprocess.Popen[bytes], marks: Path, ranks: int, rng: random.Random) -> list[float]:
    """Kill a random rank at a random moment of a later step; seconds of the parts.

    Raises:
        RuntimeError: the run did not continue.
    """
    events = next((marks.parent / "runs").glob("*/events.jsonl"))
    attempts = _count(events, "run_started")
    reached = len(read_marks(marks)) + rng.randrange(3, 20)
    _wait(lambda: len(read_marks(marks)) >= reached, process)
    time.sleep(rng.uniform(0.0, 0.03))
    pid = int(Path(f"{marks}-pid-{rng.randrange(ranks)}").read_text())
    killed = time.time()
    os.kill(pid, signal.SIGKILL)
    _wait(lambda: _count(events, "run_started") > attempts, process)
    failed = _last(events, "rank_failed")
    started = _last(events, "run_started")
    step = wait_for_mark(marks, process, started)
    if step is None:
        raise RuntimeError("the run did not continue")
    return [failed - killed, started - failed, step - started, step - killed]


def _wait(is_true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    give_up = time.time() + _TIMEOUT
    while not is_true():
        if process.poll() is not None or time.time() > give_up:
            raise RuntimeError("the run did not continue")
        time.sleep(0.005)


def _count(events: Path, kind: str) -> int:
    return sum(event["kind"] == kind for event in read_events(events))


def _last(events: Path, kind: str) -> float:
    return float([event["time"] for event in read_events(events) if event["kind"] == kind][-1])


def main() -> None:
    """Print the median, the lowest and the highest value of each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311 -- no secret
    with running("launcher", options.ranks, 100_000, restarts=options.kills + 1, pause=options.pause) as (
        process,
        marks,
        began,
    ):
        if wait_for_mark(marks, process, began) is None:
            raise SystemExit("the run did not start")
        rows = [measure_kill(process, marks, options.ranks, rng) for _ in range(options.kills)]
    print(f"{options.ranks} ranks, {options.kills} kills, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, values in zip(_PARTS, zip(*rows, strict=True), strict=True):
        print(f"{name:8} {statistics.median(values):.3f} s ({min(values):.3f}-{max(values):.3f})")


if __name__ == "__main__":
    main()
