"""One of several gloo ranks that run random programs: `python -m tests.support.resume_ranks FOLDER FIRST COUNT`.

Writes the result of each seed to FOLDER as `rank-<r>.json`. RANK and WORLD_SIZE are its variables.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from tests.support.program_ranks import results_of_rank
from tests.support.resume_programs import compared, random_program


def main(folder: Path, first: int, count: int) -> None:
    with results_of_rank(folder) as seen:
        for seed in range(first, first + count):
            print(f"rank {os.environ['RANK']}: seed {seed}", flush=True)
            found, notices = compared(random_program(seed), folder / str(seed))
            seen[str(seed)] = {"found": found, "notices": notices}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
