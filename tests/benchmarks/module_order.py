"""A step of ZeRO 3 with its module order kept, and under plain Lightning.

    python -m tests.benchmarks.module_order [--families deep_mlp gpt] [--repeats 5] [--batch 16]

Two gloo ranks, runs of 8 steps in turns; the first step of each is left out. The modules' `training_step` calls
`self(batch)`, as in most modules.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from strategies.registry import ZERO_3
from tests.support.limited_runs import Case, ranks_ready, run_case
from tests.support.model_families import LARGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["deep_mlp", "gpt"], choices=list(LARGE))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    with ranks_ready() as context:
        for family in options.families:
            medians: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(options.repeats):
                for kept in medians:
                    case = Case(family, ZERO_3, options.batch, steps=8, timed=True, keeps_order=kept)
                    with tempfile.TemporaryDirectory() as folder:
                        outcome = run_case(context, case, Path(folder))
                    assert outcome.lives, outcome.reason
                    medians[kept].append(statistics.median(outcome.step_seconds))
            ratios = [ours / theirs for ours, theirs in zip(medians[True], medians[False], strict=True)]
            ours, theirs = (statistics.median(medians[kept]) for kept in (True, False))
            print(f"{family}: kept {ours:.3f} s a step, not kept {theirs:.3f} s; ratio {statistics.median(ratios):.3f} "
                  f"({min(ratios):.3f} to {max(ratios):.3f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
