"""`launcher report` on a run of 4 ranks, 100,000 steps and 50 skipped steps: seconds and bytes.

python -m tests.benchmarks.report_cost [STEPS_BETWEEN_LOGS ...]
"""

from __future__ import annotations

import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.made_run import MadeRun

RANKS, STEPS, SKIPS = 4, 100_000, 50


def make(path: Path, every: int) -> None:
    """The run, logged each `every` steps."""
    run = MadeRun(path, RANKS, precision="16-mixed")
    source = random.Random(0)  # noqa: S311 -- made-up numbers
    skips = sorted(source.sample(range(STEPS), SKIPS))
    run.start()
    for step in range(every, STEPS + 1, every):
        skipped = sum(skip < step for skip in skips)
        loss = 4 * math.exp(-step / 20_000) + 0.5 + source.gauss(0, 0.05)
        run.step(step, source.gauss(0.1, 0.005), loss)
        own = [abs(source.gauss(0.04, 0.002)) for _ in range(RANKS)]
        run.ranks(step, scale=65536.0 / 2 ** (skipped % 8), skipped=skipped, own=own)
    run.write_event("finished", step=STEPS, metrics={})


def main() -> None:
    """Print one line for each interval."""
    for every in [int(word) for word in sys.argv[1:]] or [50, 1]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            make(path, every)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "launcher", "report", str(path)], check=True, capture_output=True)
            wall = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            events, page = (path / "events.jsonl").stat().st_size, (path / "report.html").stat().st_size
            took = f"{wall:.2f} s wall, {cpu:.2f} s CPU"
            print(f"logged each {every} steps: events {events / 1e6:.1f} MB; report {took}, {page / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
