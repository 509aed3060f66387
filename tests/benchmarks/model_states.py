"""Model states: the formulas against live tensors of real gloo runs, 12 models x strategies x N x precisions.

    python -m tests.benchmarks.model_states [--ranks 1 2 4] [--models mlp odd ...] [--stages 0 1 2 3 fsdp2 ...]

Stages are those of ZeRO, 0 without it, and FSDP2's variants: under `hsdp` half of the ranks share the states.
Prints each part that differs, and how many are exact.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support.live_comparison import compare
from tests.support.live_shards import VARIANTS
from tests.support.model_zoo import MODELS

STAGES = ("0", "1", "2", "3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--stages", nargs="+", default=[*STAGES, *VARIANTS], choices=[*STAGES, *VARIANTS])
    options = parser.parse_args()
    zero = [int(stage) for stage in options.stages if stage in STAGES]
    sharded = [stage for stage in options.stages if stage in VARIANTS]
    total = exact = 0
    cases = set[object]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in options.ranks:
            for stages, dtypes in ((zero, ("fp32", "bf16")), (sharded, ("fp32", "bf16", "mixed"))):
                if not stages:
                    continue
                for found in compare(options.models, stages, dtypes, ranks, folder, folder, 1800):
                    total += 1
                    cases.add((found.model, found.stage, found.dtype, found.world_size))
                    exact += found.live == found.formula
                    if found.live != found.formula:
                        print(f"differs by {found.live - found.formula} bytes: {found}")
    print(f"{exact} of {total} parts exact to the byte ({len(cases)} cases)")


if __name__ == "__main__":
    main()
