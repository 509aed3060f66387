"""Random programs that are interrupted and resumed, on two real ranks."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_warm
from tests.support.resume_programs import differences_on_one_rank, is_placed, judged, random_program
from tests.support.runs import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
_RANKS = 2
# LAUNCHER_RESUME_PROGRAMS=500 runs more of them.
_COUNT = int(os.environ.get("LAUNCHER_RESUME_PROGRAMS", "12"))
_ON_ONE = [seed for seed in range(_COUNT) if is_placed(random_program(seed))]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and the results of two ranks for each seed; one start for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")

    def one(rank: int) -> None:
        env = {"RANK": str(rank), "WORLD_SIZE": str(_RANKS), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.support.resume_ranks", str(folder), "0", str(_COUNT)]
        run_warm(command, folder, env=env, timeout=240 + 20 * _COUNT).check()

    with ThreadPoolExecutor(_RANKS) as pool:
        list(pool.map(one, range(_RANKS)))
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(_RANKS)]


@pytest.mark.parametrize("seed", range(_COUNT))
def test_on_every_rank_a_resumed_run_equals_the_uninterrupted_one_or_rank_zero_reports_the_difference(
    played: tuple[Path, list[dict[str, Any]]], seed: int
) -> None:
    program = random_program(seed)
    notices = played[1][0][str(seed)]["notices"]
    wrong = [judged(program, rank[str(seed)]["found"], notices) for rank in played[1]]
    assert wrong == [[], []], program


@pytest.mark.parametrize("seed", _ON_ONE)
def test_one_rank_resumes_with_the_samples_that_two_ranks_have_not_used(
    played: tuple[Path, list[dict[str, Any]]], seed: int
) -> None:
    program = random_program(seed)
    assert differences_on_one_rank(program, played[0] / str(seed)) == [], program
