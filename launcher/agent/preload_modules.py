"""What installed packages the user's files import, found by reading them: nothing of the user's runs here.

The fork server may import an installed package for all ranks. The user's own files are left to the ranks: at module
level they may read RANK, which only a rank has.
"""

from __future__ import annotations

import ast
import builtins
import functools
import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

# More files than a user writes: then a whole library lies beside them, which each rank imports by itself.
_MOST_FILES = 300
_CODE_RUNNERS = frozenset({"exec", "eval", "compile", "__import__", "setattr", "delattr"})
_ENVIRONMENT_READERS = frozenset({"os.environ.get", "os.getenv"})


def installed_imports(class_paths: Iterable[str]) -> list[str]:
    """Imports of installed packages at the head of the user's files, in the order in which they would run.

    Reading ends at the first statement that may change what a later import does, such as one that sets an environment
    variable: what comes after it is left to the ranks.

    Args:
        class_paths: import paths of the classes that a config names.

    Returns:
        'module', or 'module:name' where a name is imported from it.
    """
    reader = _ImportReader()
    for path in class_paths:
        module, _, name = path.rpartition(".")
        if module:
            reader.read(module, name)
    return list(dict.fromkeys(reader.found))


class _ImportReader:
    def __init__(self) -> None:
        self.found: list[str] = []
        self._seen: set[str] = set()
        self._stopped = False

    def read(self, module: str, name: str = "") -> bool:
        """Note an installed module, or read a file of the user's with all that it imports.

        Returns:
            whether the module is an installed one, or is not there.
        """
        parts = module.split(".")
        place: list[str] | None = None
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            spec = _find(prefix, place)
            if spec is None:
                return True
            if _is_installed(spec):
                self._note(module, name)
                return True
            place = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
            if prefix not in self._seen:
                self._seen.add(prefix)
                self._read_file(prefix, spec)
        if name and place is not None and f"{module}.{name}" not in self._seen and _find(f"{module}.{name}", place):
            self.read(f"{module}.{name}")
        return False

    def _note(self, module: str, name: str) -> None:
        if not self._stopped and module.partition(".")[0] not in sys.stdlib_module_names:
            self.found.append(f"{module}:{name}" if name else module)

    def _read_file(self, module: str, spec: ModuleSpec) -> None:
        if spec.origin is None:
            return  # a folder without __init__.py
        package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
        try:
            tree = ast.parse(Path(spec.origin).read_bytes())
        except (OSError, SyntaxError, ValueError):
            # The rank that imports it reports it; an extension module may do anything.
            self._stopped = True
            return
        self._stopped = self._stopped or len(self._seen) > _MOST_FILES
        names: set[str] = set()
        for statement in tree.body:
            if self._stopped:
                return
            self._statement(statement, package, names)

    def _statement(self, statement: ast.stmt, package: str, names: set[str]) -> None:
        """One statement at module level. `names` are the installed packages' in this file."""
        match statement:
            case ast.Import():
                for alias in statement.names:
                    if self.read(alias.name):
                        names.add(alias.asname or alias.name.partition(".")[0])
            case ast.ImportFrom():
                module = _absolute(statement, package)
                for alias in statement.names:
                    if self.read(module, "" if alias.name == "*" else alias.name):
                        names.add(alias.asname or alias.name)
            case ast.Try():
                for inner in (*statement.body, *statement.orelse, *statement.finalbody):
                    self._statement(inner, package, names)
            case ast.If() if "TYPE_CHECKING" in ast.unparse(statement.test):
                for inner in statement.orelse:
                    self._statement(inner, package, names)
            case ast.If() if "__name__" in ast.unparse(statement.test):
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Pass():
                return
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Assign() | ast.AnnAssign() if _only_names(statement) and _computes(statement.value, names):
                return
            case _:
                self._stopped = True


def _only_names(statement: ast.Assign | ast.AnnAssign) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.Store) for t in targets for node in ast.walk(t))


def _computes(value: ast.expr | None, names: set[str]) -> bool:
    """Whether an expression only calls what is built in or installed, and nothing that sets the environment."""
    calls = [node.func for node in ast.walk(value) if isinstance(node, ast.Call)] if value is not None else []
    return all(_is_harmless(function, names) for function in calls)


def _is_harmless(function: ast.expr, names: set[str]) -> bool:
    path = ast.unparse(function)
    if path in _ENVIRONMENT_READERS:
        return True
    root = function
    # A method of a result is the business of what made the result.
    while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
        root = root.func if isinstance(root, ast.Call) else root.value
    known = isinstance(root, ast.Constant | ast.JoinedStr)
    if isinstance(root, ast.Name):
        known = root.id in names or (hasattr(builtins, root.id) and root.id not in _CODE_RUNNERS)
    return known and "env" not in path and "chdir" not in path


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    if not statement.level:
        return statement.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - statement.level + 1]
    return ".".join([*base, *filter(None, [statement.module])])


def _find(name: str, place: list[str] | None) -> ModuleSpec | None:
    """Where a module would be imported from, without importing the packages that it lies in."""
    if place is not None:
        # Its bare name: the whole one makes Python look at the package, which is not imported.
        return PathFinder.find_spec(name.rpartition(".")[2], place)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            spec = None if find is None else find(name, None)
        except (ImportError, OSError, ValueError):
            continue  # a finder of somebody else's
        if spec is not None:
            return spec
    return None


def _is_installed(spec: ModuleSpec) -> bool:
    """Whether it comes with Python or lies where packages are installed; the launcher itself counts."""
    if spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen") or not Path(spec.origin).is_absolute():
        return spec.origin in ("built-in", "frozen")
    if {"site-packages", "dist-packages"} & set(Path(spec.origin).parts):
        return True  # another interpreter's, by PYTHONPATH
    return os.path.realpath(spec.origin).startswith(_installed_folders())


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)
