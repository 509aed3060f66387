"""Samples per second of the demo: `torchrun -m launcher` against a bare Lightning Trainer under the same torchrun.

    python -m tests.benchmarks.throughput [--repeats 5] [--steps 200] [--ranks 1 2] [--strategy ddp|fsdp2]

In turns in one run, one thread a rank; medians over the runs, and the median of the pairs' ratios. `mean` counts all
steps of a run, `median` its median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GLOBAL_BATCH = 32


def samples_per_second(arguments: list[str], ranks: int, folder: str) -> dict[str, float]:
    """The speed of one run by mean and by median step, measured inside the run."""
    speed = Path(folder) / "speed"
    speed.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *arguments,
    ]
    env = {**os.environ, "SPEED": str(speed), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=300)
    return {kind: value * GLOBAL_BATCH for kind, value in json.loads(speed.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    options = parser.parse_args()
    ours = ["-m", "launcher", "--trainer.max_steps", str(options.steps), "--trainer.limit_val_batches", "0"]
    ours += ["--checkpoint.monitor", "null", "--trainer.callbacks", "[{class_path: tests.benchmarks.clock.Clock}]"]
    bare = ["-m", "tests.benchmarks.bare_lightning", str(options.steps), options.strategy]
    if options.strategy == "fsdp2":
        ours += ["--strategy", "fsdp2"]
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            pairs = [
                (samples_per_second(ours, ranks, folder), samples_per_second(bare, ranks, folder))
                for _ in range(options.repeats)
            ]
            for kind in ("mean", "median"):
                ratios = [a[kind] / b[kind] for a, b in pairs]
                print(
                    f"{ranks} rank{'s' if ranks > 1 else ''}, {kind:6}: launcher "
                    f"{statistics.median(a[kind] for a, _ in pairs):.0f}, bare Lightning "
                    f"{statistics.median(b[kind] for _, b in pairs):.0f} samples/s, "
                    f"ratio {statistics.median(ratios):.3f} (target at least 0.98); "
                    f"ratios {', '.join(f'{r:.3f}' for r in ratios)}"
                )


if __name__ == "__main__":
    main()
