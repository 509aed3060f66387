"""Wall time of the help commands, and of a submission's dry run, against `torchrun --help`.

    python -m tests.benchmarks.startup [--repeats 9]

In turns in one run; medians and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "torchrun --help": [str(BIN / "torchrun"), "--help"],
    "launcher --help": [str(BIN / "launcher"), "--help"],
    "launcher plan --help": [str(BIN / "launcher"), "plan", "--help"],
    "submit --dry-run": [str(BIN / "launcher"), "submit", "--dry-run", "--nodes", "2", "--gpus-per-node", "8"],
}
TARGETS = {"submit --dry-run": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    # The first round fills the disk cache.
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    base = medians["torchrun --help"]
    for name, median in medians.items():
        print(
            f"{name:22} {median:6.3f} s   ratio {median / base:.3f}"
            + (f" (target at most {TARGETS.get(name, 0.1)})" if median != base else "")
        )


if __name__ == "__main__":
    main()
