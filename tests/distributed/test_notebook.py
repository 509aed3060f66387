"""The coordinator where there is no script: code that is piped to Python, as a notebook's kernel gets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import events_of, read_trace, toy_env
from tests.processes import run

pytestmark = pytest.mark.slow

# A notebook has computed something, with threads, before it trains.
_CELLS = """
import json, os
import torch
torch.set_num_threads({threads})
torch.randn(600, 600) @ torch.randn(600, 600)
from launcher import TrainingCoordinator
from launcher.config import WandbOptions
from tests.toy import Toy, ToyData

model = Toy(by_rank=1, raise_at={raise_at})
coordinator = TrainingCoordinator("runs", use_gpu=False, precision="32", devices=2, notebook_processes={allowed},
                                  wandb=WandbOptions("disabled"))
before = {{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}}
for name in {names}:
    end = coordinator.train(model, ToyData(), name=name, enable_progress_bar=False, enable_model_summary=False)
    print("FOUND", json.dumps([name, end["plan"].world_size, end["trainer"].global_step, os.getpid()]), flush=True)
print("NEXT CELL", len(before), {{k for k in os.environ if k in ("RANK", "WORLD_SIZE")}}, flush=True)
"""


def notebook(folder: Path, *, code: int = 0, **settings: Any) -> str:
    cells = _CELLS.format(**{"threads": 1, "raise_at": -1, "allowed": True, "names": ["only"], **settings})
    (folder / "cells").write_text(cells)
    command = ["sh", "-c", 'exec "$0" - < cells', sys.executable]
    return run(command, folder, env=toy_env(folder / "trace"), timeout=240).check(code).output


def found_in(output: str) -> list[Any]:
    return [json.loads(line.split(" ", 1)[1]) for line in output.splitlines() if line.startswith("FOUND")]


@pytest.mark.case(44)
def test_a_notebook_trains_on_one_process_with_one_notice(tmp_path: Path) -> None:
    output = notebook(tmp_path, allowed=False)
    ((_, world, steps, _),) = found_in(output)
    assert (world, steps) == (1, 16)
    assert output.count("notice: this is a notebook, so one process trains instead of 2") == 1
    (notice,) = events_of(tmp_path / "runs" / "only", "notice")
    assert "notebook_processes=True" in notice["message"]
    assert not Path(f"{tmp_path}/trace-1").exists()


@pytest.mark.case(44)
def test_a_notebook_that_may_trains_on_two_forked_ranks_and_goes_on_as_one(tmp_path: Path) -> None:
    output = notebook(tmp_path, names=["first", "second"], threads=2)
    found = found_in(output)
    assert [(name, world, steps) for name, world, steps, _ in found] == [("first", 2, 8), ("second", 2, 8)]
    assert len({pid for *_, pid in found}) == 1
    assert output.count("NEXT CELL") == 1
    assert output.rstrip().endswith("set()"), "nothing of the ranks is left in the environment"
    assert "this is a notebook" not in output
    for rank in (0, 1):
        assert [step for step, _, _ in read_trace(tmp_path / "trace", rank)] == [*range(8), *range(8)]
    seen = [n for rank in (0, 1) for _, index, _ in read_trace(tmp_path / "trace", rank)[:8] for n in index]
    assert sorted(seen) == list(range(64))
    for name in ("first", "second"):
        logs = (tmp_path / "runs" / name / "logs").iterdir()
        assert sorted(log.name for log in logs) == ["rank-0.log", "rank-1.log"]
        (planned,) = events_of(tmp_path / "runs" / name, "planned")
        assert planned["plan"]["strategy"]["name"] == "ddp"


@pytest.mark.case(44)
def test_a_forked_rank_that_fails_ends_the_cell_with_its_words_and_none_is_left(tmp_path: Path) -> None:
    output = notebook(tmp_path, raise_at=3, code=1)
    assert "ValueError: the user's own mistake" in output
    assert "TrainingError: rank 1 (" in output
    assert "NEXT CELL" not in output
    failed = {event["rank"]: event["error"] for event in events_of(tmp_path / "runs" / "only", "failed")}
    assert failed[1] == "ValueError: the user's own mistake"
