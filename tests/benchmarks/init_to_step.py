"""Seconds from `launcher init --yes --preset debug` to the first training step of the config that it writes.

    python -m tests.benchmarks.init_to_step [--repeats 5]

A new user's steps: the config is written, `launcher fit --config` trains it. The clock starts
before `init` and ends with the event of the first optimizer step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(folder: Path) -> tuple[float, float]:
    """Seconds of `init`, and to the end of the first step."""
    env = {**os.environ, "WANDB_MODE": "offline"}
    arguments = [sys.executable, "-m", "launcher"]
    began = time.time()
    subprocess.run(
        [*arguments, "init", "--yes", "--preset", "debug"], cwd=folder, env=env, check=True, capture_output=True
    )
    written = time.time()
    fit = [*arguments, "fit", "--config", "run.yaml", "--name", "first"]
    done = subprocess.run(fit, cwd=folder, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    events = map(json.loads, (folder / "runs" / "first" / "events.jsonl").read_text().splitlines())
    first = next(event["time"] for event in events if event["kind"] == "first_step")
    return written - began, first - began


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    took: list[tuple[float, float]] = []
    # The first round fills the disk cache.
    for _ in range(1 + parser.parse_args().repeats):
        with tempfile.TemporaryDirectory() as folder:
            took.append(measure(Path(folder)))
    init, first = (statistics.median(times) for times in zip(*took[1:], strict=True))
    spread = ", ".join(f"{seconds:.2f}" for _, seconds in took[1:])
    print(f"init {init:.2f} s; init to first step {first:.2f} s (medians; {spread})")


if __name__ == "__main__":
    main()
