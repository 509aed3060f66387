"""Cost of monitoring the loss scale of all ranks in a step: `AmpWandbCallback` against the common way.

    python -m tests.benchmarks.monitor_cost [--ranks 4] [--rounds 30] [--steps 50]

One training in fp16 (Lightning DDP over gloo, real GradScaler, real W&B offline). Blocks of `--steps` steps take turns:
bare DDP; with `AmpWandbCallback` and `CountingGradScaler`, one sample a block; and the common way in every step, which
is `self.log(sync_dist=True)` of 8 values, `get_scale()` and `wandb.log`. The order rotates from round to round, the
first steps of a block are left out, and each figure is the median over the rounds of a block's mean step against the
bare one of the same round.
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
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
VARIANTS = ("bare", "launcher", "common")
LEFT_OUT = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "blocks.json"
        arguments = [str(out), str(options.rounds), str(options.steps), str(options.width)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(options.ranks), "-m", "tests.benchmarks.monitor_cost_worker", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline"}
        env |= {"WANDB_SILENT": "true"}
        began = time.monotonic()
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=1800)
        rounds: list[dict[str, Any]] = json.loads(out.read_text())
    bare = statistics.median(r["bare"] for r in rounds)
    print(
        f"{options.ranks} ranks, {len(rounds)} rounds of {options.steps} steps, {time.monotonic() - began:.0f} s in all"
    )
    print(f"bare DDP: {bare * 1e3:.2f} ms a step")
    added = {}
    for variant in VARIANTS[1:]:
        seconds = [r[variant] - r["bare"] for r in rounds]
        shares = [r[variant] / r["bare"] - 1 for r in rounds]
        low, _, high = statistics.quantiles(shares, n=4)
        added[variant] = statistics.median(seconds)
        print(
            f"{variant:8}: {added[variant] * 1e6:+7.0f} us a step, median {statistics.median(shares):+.2%} "
            f"(quartiles {low:+.2%} to {high:+.2%})"
        )
    print(f"launcher / common: {added['launcher'] / added['common']:.3f} (target at most 0.1; +1 % at most)")


if __name__ == "__main__":
    main()
