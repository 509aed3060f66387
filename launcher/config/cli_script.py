"""The classes that a user's LightningCLI script fixes: its config files do not name them. Nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_CLI = "LightningCLI"
# LightningCLI's arguments, in their order.
_ARGUMENTS = {"model_class": "model", "datamodule_class": "data"}
_MOST_SCRIPTS = 100


@dataclass(frozen=True, slots=True)
class CliScript:
    """A script that calls LightningCLI: its path, and the import path of the class of `model` and `data`."""

    path: Path
    classes: Mapping[str, str]


def find_cli_script(folder: Path) -> CliScript | None:
    """The script in the folder that fixes classes; None if there is none, or several with different classes."""
    found: list[CliScript] = []
    for path in sorted(folder.glob("*.py"))[:_MOST_SCRIPTS]:
        try:
            text = path.read_text(encoding="utf-8")
            classes = _find_classes(ast.parse(text), path.stem) if _CLI in text else {}
        except (OSError, ValueError, SyntaxError):
            continue  # advice only: a file that Python cannot read is no such script
        if classes:
            found.append(CliScript(path, classes))
    return found[0] if found and all(each.classes == found[0].classes for each in found) else None


def _find_classes(tree: ast.Module, module: str) -> dict[str, str]:
    """The import path of the class for each key, by the first call that has classes."""
    imported = _find_import_paths(tree, module)
    own = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(_last_name(base) == _CLI for base in node.bases)
    }
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _last_name(call.func) in {_CLI, *own}:
            given = dict(zip(_ARGUMENTS, call.args, strict=False))
            given |= {each.arg: each.value for each in call.keywords if each.arg in _ARGUMENTS}
            paths = {_ARGUMENTS[name]: _resolve(value, imported) for name, value in given.items()}
            if any(paths.values()):
                return {key: path for key, path in paths.items() if path}
    return {}


def _find_import_paths(tree: ast.Module, module: str) -> dict[str, str]:
    """The import path of each name of the module: its own classes, and absolute imports."""
    paths: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            paths[node.name] = f"{module}.{node.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            paths |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            for each in node.names:
                first = each.name.partition(".")[0]
                paths[each.asname or first] = each.name if each.asname else first
    return paths


def _resolve(value: ast.expr, imported: Mapping[str, str]) -> str | None:
    """The import path of a name, or of an attribute of an imported module; None for anything else."""
    first, dot, rest = ast.unparse(value).partition(".")
    is_path = first in imported and isinstance(value, ast.Name | ast.Attribute)
    return f"{imported[first]}{dot}{rest}" if is_path else None


def _last_name(value: ast.expr) -> str:
    return value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
