"""Recovery from killed ranks: SIGKILL at a random moment of a random step.

    python -m tests.benchmarks.recovery [--rounds 10] [--ranks 2] [--peers launcher,torchrun,nvrx,torchft]
    python -m tests.benchmarks.recovery --oracle [--cases mlp,bn] [--ranks 2,3] [--rounds 20] [--dead 1]
    python -m tests.benchmarks.recovery --oracle --moments all [--cases mlp,bn] [--ranks 2,3]
    python -m tests.benchmarks.recovery --cost [--parts HeartbeatCallback] [--ranks 2] [--rounds 30]

The first one runs the same training under each tool in turns, and measures from outside. The peers' interpreter is
--peers-python or the environment variable PEERS_PYTHON. They are not installed with the tests: `pip install --no-deps
nvidia-resiliency-ext torchft defusedxml nvidia-ml-py pynvml` into a virtual environment with torch and Lightning.

The second one is the launcher's acceptance test: all runs go on, no step is done again, and losses and states equal
the undisturbed run's to the bit; exit code 1 otherwise. The third one measures what parts of the launcher cost in a
step; see `cost.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.recovery.cases import CASES
from tests.benchmarks.recovery.contestants import CONTESTANTS, Settings
from tests.benchmarks.recovery.cost import measure
from tests.benchmarks.recovery.oracle import OracleOptions, check
from tests.benchmarks.recovery.peers import compare
from tests.benchmarks.recovery.self_kill import MOMENTS


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _known(given: list[str], valid: list[str]) -> list[str]:
    unknown = [name for name in given if name not in valid]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; valid: {', '.join(valid)}")
    return given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", action="store_true", help="the acceptance test")
    parser.add_argument("--cost", action="store_true", help="the cost of a step")
    parser.add_argument("--parts", type=_words, default=["HeartbeatCallback"], help="what --cost measures")
    parser.add_argument("--steps", type=int, default=50, help="steps in a block of --cost")
    parser.add_argument("--ranks", type=_words, help="numbers of ranks: 2 by default, 2,3 for the acceptance test")
    parser.add_argument("--rounds", type=int, help="10 by default, 20 for the acceptance test, 30 for the cost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=_words, default=list(CONTESTANTS))
    parser.add_argument("--peers-python", default=os.environ.get("PEERS_PYTHON", sys.executable))
    parser.add_argument("--cases", type=_words, default=list(CASES))
    parser.add_argument("--dead", type=int, default=1, help="ranks killed at once in the acceptance test")
    parser.add_argument("--moments", type=_words, default=[], help="one kill of each rank in each of these moments, "
                        f"instead of --rounds: all, or {', '.join(MOMENTS)}")  # fmt: skip
    parser.add_argument("--extra", type=_words, default=[], help="additional arguments of `launcher fit`")
    parser.add_argument("--verbose", action="store_true", help="print perfect rounds too")
    parser.add_argument("--keep-redone", action="store_true", help="keep rounds whose only fault is steps done again")
    options = parser.parse_args()
    # `timeout` ends this process with SIGTERM; its runs must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ranks = [int(number) for number in options.ranks or (("2", "3") if options.oracle else ("2",))]
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    if options.oracle:
        moments = _known(list(MOMENTS) if options.moments == ["all"] else options.moments, list(MOMENTS))
        own = OracleOptions(rounds=options.rounds or 20, dead=options.dead, seed=options.seed, moments=moments,
                            extra=options.extra, verbose=options.verbose, keep_redone=options.keep_redone)  # fmt: skip
        return 0 if check(_known(options.cases, list(CASES)), ranks, folder, own) else 1
    for number in ranks:
        place = folder / str(number)
        place.mkdir()
        print(f"{number} ranks", flush=True)
        if options.cost:
            measure(options.parts, number, options.rounds or 30, options.steps, place)
            continue
        settings = Settings(options.peers_python, number, place)
        compare(_known(options.peers, list(CONTESTANTS)), options.rounds or 10, settings, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
