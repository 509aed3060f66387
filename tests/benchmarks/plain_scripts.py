"""A plain PyTorch script (DDP, torch alone): `launcher run` against `torchrun`, in turns.

    python -m tests.benchmarks.plain_scripts [--ranks 2 8] [--repeats 5] [--kills 5]

Seconds from the command to the end of the first optimizer step, and from SIGKILL of a rank to the end of the next step
with `--max-restarts 1`. Medians, and the median of the pairs' ratios. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import signal
import sys

from tests.benchmarks.launch import kill_seconds, report, start_seconds

_OURS, _PEER = "launcher run", "torchrun, plain script"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    # `timeout` ends this process with SIGTERM; its runs must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for ranks in options.ranks:
        times = [(start_seconds(_OURS, ranks), start_seconds(_PEER, ranks)) for _ in range(options.repeats)]
        report(f"start, {ranks} ranks", "s", [a for a, _ in times], {_PEER: [b for _, b in times]})
    times = [(kill_seconds(_OURS), kill_seconds(_PEER)) for _ in range(options.kills)]
    report("kill to next step, 2 ranks", "s", [a for a, _ in times], {_PEER: [b for _, b in times]})


if __name__ == "__main__":
    main()
