"""Whether a class of the config is surely missing, from the source alone: no import, so that it takes milliseconds.

What cannot be decided counts as present; `launcher.user_code.classes` imports the class later.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from launcher.config.schema import RunConfig

_UNDECIDED = "*"


def is_surely_wrong(config: RunConfig, *, has_all_modules: bool = True) -> bool:
    """Whether the model or the data names a module, a class or an argument that does not exist.

    Without `has_all_modules`, this machine may lack modules that the machine of the ranks has.
    """
    return any(_is_wrong(spec, has_all_modules) for spec in (config.model, config.data) if spec)


def _is_wrong(spec: Mapping[str, Any], has_all_modules: bool) -> bool:
    module, _, name = str(spec.get("class_path")).rpartition(".")
    if not module:
        return False
    source = _find_source(module)
    if source is None:
        return has_all_modules
    try:
        tree = ast.parse(source.read_bytes()) if source.suffix == ".py" else None
    except (OSError, SyntaxError, ValueError):
        return True
    if tree is None:
        return False
    names = dict(_list_names(tree))
    if name not in names:
        return _UNDECIDED not in names
    accepted = _list_arguments(names[name])
    return accepted is not None and not accepted.issuperset(spec.get("init_args") or {})


def _find_source(module: str) -> Path | None:
    """The file of a module, or of what contains it if that is no plain source; None if there is no such module."""
    folders: list[str] | None = None
    found = None
    parts = module.split(".")
    for number in range(len(parts)):
        try:
            found = PathFinder.find_spec(".".join(parts[: number + 1]), folders)
            locations = None if found is None else found.submodule_search_locations
            folders = None if locations is None else list(locations)
        except KeyError:
            return Path(parts[0])  # a folder without __init__.py, in a package that is not imported
        if found is None:
            # A package may create its modules when it is imported, as `os.path` is; Python contains some modules.
            return None if number == 0 and module not in sys.builtin_module_names else Path(parts[0])
        if folders is None and number < len(parts) - 1:
            return Path(parts[0])
    return Path(found.origin) if found is not None and found.origin and found.has_location else Path(parts[0])


def _list_names(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The names at the top level of a module, also in `if` and `try`; `*` for names that only an import shows."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield (_UNDECIDED if node.name == "__getattr__" else node.name), node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.Name | ast.Global):
            # Also `globals()[name] = ...`.
            yield (node.id, node) if isinstance(node, ast.Name) and node.id != "globals" else (_UNDECIDED, node)
        else:
            yield from _list_names(node)


def _list_arguments(node: ast.AST) -> set[str] | None:
    """The arguments of a class with an `__init__` of its own; None if they are not known."""
    if not isinstance(node, ast.ClassDef) or node.decorator_list:
        return None
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__" and not each.decorator_list:
            arguments = each.args
            given = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            return None if arguments.kwarg else {argument.arg for argument in given}
    return None
