"""Reads and writes sbatch's `--array`: the chosen members of a job array, and how many run at once. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from slurm.job import JobRequestError, OptionProblem

_PART = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", re.ASCII)
_EXPECTED = (
    "expected members and how many at once, as in 0-3, 0,2,5, 0-8:2 or 0-7%2; %2 alone is all of them, two at once"
)


@dataclass(frozen=True, slots=True)
class ArrayChoice:
    """The chosen members of an array: ascending indices, and how many may run at once (None: no limit)."""

    indices: tuple[int, ...]
    at_once: int | None = None

    def __str__(self) -> str:
        """In sbatch's form: `0-3,7%2`."""
        text = ",".join(_ranges(self.indices))
        return text if self.at_once is None else f"{text}%{self.at_once}"


def read_array(text: str | None, members: int) -> ArrayChoice:
    """Read `--array`; without indices, or None, it selects all of the `members`.

    Raises:
        JobRequestError: the text is not in sbatch's form, or selects members that do not exist.
    """
    chosen, percent, limit = (text or "").partition("%")
    if text is not None and (not text or (percent and not re.fullmatch(r"[1-9]\d{0,8}", limit, re.ASCII))):
        raise JobRequestError([OptionProblem("array", f"given {text!r}; {_EXPECTED}")])
    at_once = int(limit) if percent else None
    if not chosen:
        return ArrayChoice(tuple(range(members)), at_once)
    indices: set[int] = set()
    for part in chosen.split(","):
        found = _PART.fullmatch(part)
        first, last, step = (int(found[1]), int(found[2] or found[1]), int(found[3] or 1)) if found else (0, 0, 0)
        if first > last or step == 0:
            raise JobRequestError([OptionProblem("array", f"given {text!r}; {_EXPECTED}")])
        if last >= members:
            message = f"given {text!r}, but the sweep's members are 0 to {members - 1}"
            raise JobRequestError([OptionProblem("array", message)])
        indices.update(range(first, last + 1, step))
    return ArrayChoice(tuple(sorted(indices)), at_once)


def _ranges(indices: Iterable[int]) -> list[str]:
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]
