"""`--array`, in sbatch's form."""

from __future__ import annotations

import pytest

from slurm.array import ArrayChoice, read_array
from slurm.job import JobRequestError


@pytest.mark.parametrize(
    ("text", "indices", "at_once", "written"),
    [
        (None, (0, 1, 2, 3, 4, 5, 6, 7), None, "0-7"),
        ("%2", (0, 1, 2, 3, 4, 5, 6, 7), 2, "0-7%2"),
        ("0-3", (0, 1, 2, 3), None, "0-3"),
        ("5,0,2", (0, 2, 5), None, "0,2,5"),
        ("0-6:3%1", (0, 3, 6), 1, "0,3,6%1"),
        ("1-2,2-4,7", (1, 2, 3, 4, 7), None, "1-4,7"),
    ],
)
def test_members_and_how_many_at_once(
    text: str | None, indices: tuple[int, ...], at_once: int | None, written: str
) -> None:
    choice = read_array(text, 8)
    assert choice == ArrayChoice(indices, at_once)
    assert str(choice) == written
    assert read_array(written, 8) == choice


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "0-6:0", "0-", "%0", "%", "0%x", "1,,2", "0 1", "\u0663", "-1", "0-3%2;x"]
)
def test_other_forms_are_rejected(text: str) -> None:
    with pytest.raises(JobRequestError, match="expected members and how many at once"):
        read_array(text, 8)


def test_the_error_for_an_unknown_member_lists_the_valid_ones() -> None:
    with pytest.raises(JobRequestError, match="'6-8', but the sweep's members are 0 to 7"):
        read_array("6-8", 8)
