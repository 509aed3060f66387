"""The required cases: which of them the tests' `case` marks name."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

TESTS = Path(__file__).parents[1]
ALL = range(1, 51)


@functools.cache
def marked() -> dict[int, list[str]]:
    """Number of a case to the places that name it: read from the source, so no choice of tests hides one."""
    places: dict[int, list[str]] = {}
    for file in sorted(TESTS.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        # Parsing takes most of the time, and few files have a mark.
        for node in ast.walk(ast.parse(text)) if "mark.case" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.case"):
                place = f"{file.relative_to(TESTS)}:{node.lineno}"
                (number,) = (ast.literal_eval(argument) for argument in node.args)
                places.setdefault(number, []).append(place)
    return places


def test_every_mark_names_a_case_that_exists() -> None:
    assert {number: places for number, places in marked().items() if number not in ALL} == {}


def test_every_case_has_a_test() -> None:
    assert set(ALL) - marked().keys() == set()
