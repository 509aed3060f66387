"""Random programs that are interrupted and resumed, compared with the uninterrupted run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.resume_programs import LOADERS, Program, differences, random_program

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# LAUNCHER_RESUME_PROGRAMS=500 runs more of them.
_COUNT = int(os.environ.get("LAUNCHER_RESUME_PROGRAMS", "40"))


@pytest.mark.parametrize("seed", range(_COUNT))
def test_a_resumed_run_equals_the_uninterrupted_one_or_reports_the_difference_before(seed: int, tmp_path: Path) -> None:
    program = random_program(seed)
    assert differences(program, tmp_path) == [], program


def test_the_programs_have_every_loader_interruption_and_limit() -> None:
    programs = [random_program(seed) for seed in range(500)]
    assert {program.loader for program in programs} == set(LOADERS)
    assert len({program.end for program in programs}) == 6
    assert len({program.limit for program in programs}) == 4
    assert len({str(program.accumulate) for program in programs}) == 4


@pytest.mark.parametrize(
    "program",
    [
        Program("max_steps", 9, loader="persistent workers"),
        Program("crash", 9, loader="combined workers", every=2, counts_steps=True),
        Program("save and leave", 10, loader="combined workers", reload=1),
    ],
)
def test_loaders_with_workers_resume_at_their_position(program: Program, tmp_path: Path) -> None:
    assert differences(program, tmp_path) == []


@pytest.mark.parametrize(
    "program",
    [
        # torchdata's sampler draws from the training's generator when it is created.
        Program("stop", 12, loader="stateful", validate=None, reload=2),
        Program("max_epochs", 1, loader="stateful", reload=2),
        Program("crash", 10, loader="stateful", every=1, reload=2),
    ],
)
def test_loaders_are_reloaded_in_the_same_epochs_as_without_an_interruption(program: Program, tmp_path: Path) -> None:
    assert differences(program, tmp_path) == []


@pytest.mark.parametrize("at", [3, 4])
def test_a_validation_between_two_optimizer_steps_is_resumed_or_reported(at: int, tmp_path: Path) -> None:
    validate = (("val_check_interval", 2),)
    assert differences(Program("crash in validation", at, accumulate=3, validate=validate), tmp_path) == []
