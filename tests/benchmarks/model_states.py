"""Model states: the formulas against live tensors of real gloo runs, 12 models x stages 0-3 x N x fp32/bf16.

    python -m tests.benchmarks.model_states [--ranks 1 2 4] [--models mlp odd ...]

Prints each part that differs, and how many are exact.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support.live_comparison import compare
from tests.support.model_zoo import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    total = exact = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in options.ranks:
            for found in compare(options.models, (0, 1, 2, 3), ("fp32", "bf16"), ranks, folder, folder, 1800):
                total += 1
                exact += found.live == found.formula
                if found.live != found.formula:
                    print(f"differs by {found.live - found.formula} bytes: {found}")
    print(f"{exact} of {total} parts exact to the byte ({total // 4} cases)")


if __name__ == "__main__":
    main()
