"""The required cases, each of which a test names with its `case` mark."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

TESTS = Path(__file__).parents[1]
ALL = range(1, 51)


@functools.cache
def marked() -> dict[int, list[str]]:
    """Number of a case to the tests that name it, read from the source: independent of the selected tests."""
    places: dict[int, list[str]] = {}
    for file in sorted(TESTS.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        # Parse only files with a mark: parsing takes most of the time.
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
