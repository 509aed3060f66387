"""What `launcher run` is given to start: a file, a folder, a module or a program, and its arguments."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from launcher.cli.main import CONFIG_FILES
from launcher.core.errors import LaunchError, Problem

# A script of torchrun gets its ranks by the environment.
_OF_LAUNCHERS = ("--nproc-per-node", "--nnodes", "--node-rank", "--max-restarts", "--rdzv-endpoint", "--standalone")


def check_script(
    script: str | None, *, is_module: bool = False, is_program: bool = False
) -> Literal["file", "module", "program"]:
    """What `script` is.

    Raises:
        LaunchError: it is missing, does not exist, or is a config of `launcher fit`.
    """
    if script is None:
        raise LaunchError([Problem("SCRIPT", "not given; give a Python file, or -m and a module")])
    if is_module and is_program:
        raise LaunchError([Problem("--no-python", "given with -m; leave out one of them")])
    if is_program:
        return "program"
    if is_module:
        _check_module(script)
        return "module"
    if script.startswith("-"):
        raise LaunchError([Problem(script, "not an option of `launcher run`; see launcher run --help")])
    if not Path(script).exists():
        close = difflib.get_close_matches(script, map(str, Path().glob("*.py")), n=1)
        advice = f"did you mean {close[0]}?" if close else "give the path of a Python file"
        message = f"given {script!r}, which does not exist in {Path.cwd()}; {advice}"
        raise LaunchError([Problem("SCRIPT", message)])
    if Path(script).is_dir() and not (Path(script) / "__main__.py").exists():
        message = f"given {script!r}, a folder without a __main__.py; give the path of a Python file"
        raise LaunchError([Problem("SCRIPT", message)])
    if script.endswith(CONFIG_FILES):
        message = f"given {script!r}, which is no Python file; a config is for `launcher fit --config {script}`"
        raise LaunchError([Problem("SCRIPT", message)])
    return "file"


def _check_module(name: str) -> None:
    first = name.partition(".")[0]
    if not has_module(first):
        hint = f"; without -m, {name} is a file" if name.endswith(".py") and Path(name).exists() else ""
        message = f"given {name!r}, but there is no module {first!r} in {Path.cwd()} or installed{hint}"
        raise LaunchError([Problem("-m", f"{message}; check the name")])
    missing = find_missing_module(name)
    if missing == f"{name}.__main__":
        message = f"given {name!r}, a package without a module __main__; give one of its modules, as in {name}.train"
        raise LaunchError([Problem("-m", message)])
    if missing is not None:
        raise LaunchError([Problem("-m", f"given {name!r}, but there is no module {missing!r}; check the name")])


def has_module(package: str) -> bool:
    """Whether a top-level module exists. A package is not imported for this: it may be the user's code."""
    import importlib.util

    return bool(package) and (package in sys.modules or importlib.util.find_spec(package) is not None)


def find_missing_module(name: str) -> str | None:
    """The part of a module's name that does not exist, or the `__main__` of a package; None if it may exist.

    No package is imported for this. One that may find its modules in another way is not checked.
    """
    import importlib.util
    from importlib.machinery import PathFinder

    first, *parts = name.split(".")
    spec = None if first in sys.modules else importlib.util.find_spec(first)
    if spec is None:
        return None
    for part in (*parts, "__main__"):
        folders = spec.submodule_search_locations
        if folders is None:
            return None if part == "__main__" else f"{spec.name}.{part}"
        if spec.origin is not None and re.search("__path__|sys.modules", _read_source(spec.origin)):
            return None
        found = f"{spec.name}.{part}"
        try:
            spec = PathFinder.find_spec(found, list(folders))
        except KeyError:
            return None  # a folder without __init__.py in another one
        if spec is None:
            return found
    return None


def _read_source(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def find_misplaced_options(arguments: Sequence[str]) -> list[str]:
    """Options of the launcher, with names that scripts do not have, among the arguments of the script."""
    return [each for each in arguments if each.partition("=")[0].replace("_", "-") in _OF_LAUNCHERS]
