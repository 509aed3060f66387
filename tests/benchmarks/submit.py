"""Time of `launcher submit` in addition to sbatch.

    python -m tests.benchmarks.submit [--repeats 9]

sbatch is a stand-in that answers immediately, so all measured time is the launcher's. The target is 2 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.stand_ins import TAKEN, StandIns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    sbatch: list[float] = []
    submit: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = StandIns(Path(folder) / "bin", {"sbatch": TAKEN, "squeue": (0, "", ""), "sacct": (0, "", "")})
        script = Path(folder) / "script.sh"
        script.write_text("#!/bin/bash\n")
        for number in range(repeats + 1):
            began = time.perf_counter()
            subprocess.run([stand_ins.folder / "sbatch", script], check=True, capture_output=True)
            sbatch.append(time.perf_counter() - began)
            arguments = [sys.executable, "-m", "launcher", "submit", "--model", "my_pkg.Model", "--name",
                         f"run-{number}", "--nodes", "2", "--gpus-per-node", "8", "--no-snapshot"]  # fmt: skip
            began = time.perf_counter()
            subprocess.run(arguments, cwd=folder, env=stand_ins.env, check=True, capture_output=True)
            submit.append(time.perf_counter() - began)
    # The first round fills the disk cache.
    ours, theirs = statistics.median(submit[1:]), statistics.median(sbatch[1:])
    print(f"submit {ours:.3f} s, of which sbatch {theirs:.3f} s: {ours - theirs:.3f} s more (target 2 s)")


if __name__ == "__main__":
    main()
