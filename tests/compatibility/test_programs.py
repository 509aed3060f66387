"""Each program has the same results under the launcher and under plain Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.compatibility.compare import Outcome, differences, run_launcher, run_plain
from tests.compatibility.programs import PROGRAMS, Program
from tests.compatibility.table import FILE

pytestmark = pytest.mark.slow
_CASES = [(program, ranks) for ranks in (1, 2) for program in PROGRAMS if ranks in program.ranks]


@pytest.fixture(scope="module")
def plain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Mapping[str, Outcome]]:
    """Results of plain Lightning by number of ranks; the first access runs all programs."""
    known: dict[int, Mapping[str, Outcome]] = {}

    def of(ranks: int) -> Mapping[str, Outcome]:
        if ranks not in known:
            programs = [each for each, wanted in _CASES if wanted == ranks]
            known[ranks] = run_plain(programs, ranks, tmp_path_factory.mktemp(f"plain-{ranks}"))
        return known[ranks]

    return of


def test_the_programs_are_many_and_the_table_has_each() -> None:
    names = [program.name for program in PROGRAMS]
    assert len(names) == len(set(names)) >= 80
    rows = [line.split(" | ") for line in FILE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == names, "python -m tests.compatibility.table"
    assert {cell.rstrip(" |") for row in rows for cell in row[2:]} <= {"same", "not run"}


@pytest.mark.parametrize(("program", "ranks"), _CASES, ids=[f"{each.name}-{ranks}" for each, ranks in _CASES])
def test_a_program_does_as_under_plain_lightning(
    program: Program, ranks: int, plain_of: Callable[[int], Mapping[str, Outcome]], tmp_path: Path
) -> None:
    plain = plain_of(ranks)[program.name]
    ours = run_launcher(program, ranks, tmp_path)
    assert differences(program, plain, ours) == [], ours.output
