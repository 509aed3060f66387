"""Random programs that are interrupted and resumed, on two real ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.program_ranks import run_program
from tests.support.resume_programs import differences_on_one_rank, is_placed, judged, random_program

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
_RANKS = 2
# LAUNCHER_RESUME_PROGRAMS=500 runs more of them.
_COUNT = int(os.environ.get("LAUNCHER_RESUME_PROGRAMS", "12"))
_ON_ONE = [seed for seed in range(_COUNT) if is_placed(random_program(seed))]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and the results of two ranks for each seed; one start for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_program("tests.support.resume_ranks", folder, "0", str(_COUNT), timeout=240 + 20 * _COUNT)


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
