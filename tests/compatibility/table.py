"""`python -m tests.compatibility.table`: runs every program and writes `docs/compatibility.md`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.compatibility.compare import differences, run_launcher, run_plain
from tests.compatibility.programs import PROGRAMS, Program
from tests.support.runs import REPOSITORY

FILE = REPOSITORY / "docs" / "compatibility.md"
_COMPARED = {
    "exact": "batches, hooks, steps, learning rates, metrics, weights",
    "order": "hooks, steps, metrics' names, the samples of each epoch",
    "metrics": "hooks, steps, metrics' names",
    "fails": "the exception",
}
_HEAD = """# Compatibility with plain Lightning

Small programs that ordinary users might write. Each one runs under `LightningCLI` and under `launcher fit` with the
same file. "same" means that everything compared is equal. `python -m tests.compatibility.table` writes this page;
`tests/compatibility/test_programs.py` makes the same comparison.

On several ranks the launcher keeps the order of a loader that does not shuffle, and Lightning shuffles it. For this
comparison Lightning keeps the order too.

"""


def rows(results: Mapping[tuple[str, int], Sequence[str]]) -> list[str]:
    """The table's lines.

    Args:
        results: what differs, by program and number of ranks.
    """
    lines = ["| program | compared | 1 rank | 2 ranks |", "|---|---|---|---|"]
    for program in PROGRAMS:
        cells = [_cell(program, ranks, results) for ranks in (1, 2)]
        lines.append(f"| {program.name} | {_COMPARED[program.same]} | {cells[0]} | {cells[1]} |")
    return lines


def _cell(program: Program, ranks: int, results: Mapping[tuple[str, int], Sequence[str]]) -> str:
    if ranks not in program.ranks:
        return "not run"
    found = results[program.name, ranks]
    return "same" if not found else f"differs: {found[0].splitlines()[0][:80]}"


def main() -> int:
    """Run all programs; the exit code is 1 if there are differences."""
    results: dict[tuple[str, int], Sequence[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            chosen = [program for program in PROGRAMS if ranks in program.ranks]
            plain = run_plain(chosen, ranks, Path(folder) / f"plain-{ranks}")
            for program in chosen:
                ours = run_launcher(program, ranks, Path(folder) / f"ours-{ranks}" / program.name)
                results[program.name, ranks] = differences(program, plain[program.name], ours)
    FILE.write_text(_HEAD + "\n".join(rows(results)) + "\n")
    different = [key for key, found in results.items() if found]
    print(f"{len(results)} comparisons, {len(different)} differ: {different}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
