"""Real gloo ranks of a module of `tests.support`, which meet in a folder and write their results there."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support.processes import run_warm
from tests.support.runs import REPOSITORY


def run_program(module: str, folder: Path, *arguments: str, ranks: int = 2, timeout: float = 240) -> list[Any]:
    """The results of each rank of `python -m MODULE FOLDER ARGUMENTS`."""

    def one(rank: int) -> None:
        env = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        run_warm([sys.executable, "-m", module, str(folder), *arguments], folder, env=env, timeout=timeout).check()

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(one, range(ranks)))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@contextlib.contextmanager
def results_of_rank(folder: Path) -> Iterator[dict[str, Any]]:
    """Within a rank of such a program: the process group, and the results, which are written at the end."""
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    seen: dict[str, Any] = {}
    yield seen
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
