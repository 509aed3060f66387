"""Mutation testing of the pure modules and the callback: changes each line in turn and runs the tests that reach it.

    pip install -e ".[test,mutation]"
    python -m tests.mutation [--keep FOLDER] [MODULE ...]

Works on a copy without `@override`, because mutmut does not mutate decorated functions, and the callback consists of
those. mutmut creates the mutants and finds out which test reaches which function; `tests/support/mutant_loop.py` runs
them. Prints the score and every survivor's change. `[tool.mutmut]` in pyproject.toml lists modules and tests;
`tests/mutation.md` has the last result and the reasons of its survivors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_FOLDERS = ("strategies", "launcher", "slurm", "tests")
_FILES = ("pyproject.toml", "README.md")
# A failure is enough; no smallest example is needed.
_PROFILE = """

from hypothesis import Phase, settings

settings.register_profile("mutation", database=None, phases=(Phase.explicit, Phase.generate))
"""
_FIRST = "strategies.precision_names.x_compute_effective_precision__mutmut_1"
# Results that count as detected; a mutant that does not terminate is one.
_KILLED = ("killed", "timeout", "segfault", "caught by type check")


def copy(folder: Path) -> None:
    """Copy the parts of the repository that the tests need, without `@override` in the mutated modules."""
    for name in _FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(REPOSITORY / name, folder / name)
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mutmut"]
    for name in settings["only_mutate"]:
        file = folder / name
        file.write_text(re.sub(r"^ *@override\n", "", file.read_text(), flags=re.MULTILINE))
    for file in (folder / "tests" / "unit").rglob("*.py"):
        # A time limit that only a fault reaches.
        file.write_text(file.read_text().replace("\nLONG = 60.0\n", "\nLONG = 5.0\n"))
    with (folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(_PROFILE)


def mutmut(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run mutmut on the copy."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, env=env, text=True, check=True, stdout=subprocess.PIPE)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=Path, help="work in this folder and continue from its content, instead of a temporary folder"
    )
    parser.add_argument("modules", nargs="*", help="such as launcher.monitoring.health (default: all)")
    options = parser.parse_args()
    os.nice(5)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        if not (folder / "pyproject.toml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            copy(folder)
        # mutmut runs one mutant itself: this creates all of them, and records which test reaches which function.
        mutmut(folder, "run", "--max-children", "1", _FIRST)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "mutants")}
        command = [sys.executable, "-m", "tests.support.mutant_loop", *(f"{module}." for module in options.modules)]
        subprocess.run(command, cwd=folder / "mutants", env=environment, check=True)
        report(folder, options.modules)


def report(folder: Path, modules: list[str]) -> None:
    """Print the score of each module and in total, and every mutant that no test detected."""
    lines = mutmut(folder, "results", "--all", "true").stdout.splitlines()
    results = [tuple(part.strip() for part in line.rsplit(":", 1)) for line in lines if ":" in line]
    results = [r for r in results if not modules or any(r[0].startswith(f"{module}.") for module in modules)]
    of_module: dict[str, Counter[str]] = {}
    for name, status in results:
        module = name[: re.search(r"\.x[_ǁ]", name).start()]  # type: ignore[union-attr]
        of_module.setdefault(module, Counter())[status] += 1
    for module, counts in [*sorted(of_module.items()), ("all", sum(of_module.values(), Counter()))]:
        killed = sum(counts[status] for status in _KILLED)
        print(f"{module}: {killed} of {counts.total()} detected, {killed / counts.total():.1%}; {dict(counts)}")
    for name, status in results:
        if status not in _KILLED:
            print(f"\n{status}: {name}")
            print("".join(mutmut(folder, "show", name).stdout))


if __name__ == "__main__":
    main()
