"""One of several gloo ranks that run random programs: `python -m tests.support.resume_ranks FOLDER FIRST COUNT`.

Writes the result of each seed to FOLDER as `rank-<r>.json`. RANK and WORLD_SIZE are its variables.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support.resume_programs import compared, random_program


def main(folder: Path, first: int, count: int) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    seen: dict[str, Any] = {}
    for seed in range(first, first + count):
        print(f"rank {rank}: seed {seed}", flush=True)
        found, notices = compared(random_program(seed), folder / str(seed))
        seen[str(seed)] = {"found": found, "notices": notices}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
