"""Rules of the code base: unique class names, size of files and signatures, package docstrings, no import cycles."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "strategies", "slurm")
MOST_LINES = 320
MOST_PARAMETERS = 6
# Public functions with independent options, which callers set by keyword, and hyperparameters of a model.
INDEPENDENT_OPTIONS = {
    "launcher.coordinator.TrainingCoordinator.__init__",
    "launcher.coordinator.TrainingCoordinator.train",
    "launcher.demo.model.DemoGPT.__init__",
    "launcher.launch_function.launch",
    "launcher.monitoring.amp_callback.AmpWandbCallback.__init__",
    "strategies.memory.estimate_memory",
    "strategies.precision_agreement.reconcile",
}
# Violations that wait for the owner of their package; empty at the end.
PENDING: dict[str, set[str]] = {
    "class names": set(),
    "files": set(),
    "parameters": set(),
    "packages": set(),
    "cycles": set(),
}


def modules() -> dict[str, ast.Module]:
    found: dict[str, ast.Module] = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(file.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def named(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    """Dotted name and node of each definition, nested ones included."""

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            is_scope = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            below = f"{path}.{child.name}" if is_scope else path  # type: ignore[attr-defined]
            if isinstance(child, kind):
                yield below, child
            yield from walk(child, below)

    for module, tree in MODULES.items():
        yield from walk(tree, module)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def expect(rule: str, found: set[str]) -> None:
    """Every violation is pending, and every pending one still exists."""
    assert found - PENDING[rule] == set()
    assert PENDING[rule] - found == set(), "fixed: remove it from PENDING"


def test_class_names_are_unique() -> None:
    places = [name for name, _ in named(ast.ClassDef)]
    counts = Counter(name.rpartition(".")[2] for name in places)
    expect("class names", {name for name in places if counts[name.rpartition(".")[2]] > 1})


def test_files_are_short() -> None:
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    long = {file.relative_to(REPOSITORY).as_posix() for file in files
            if len(file.read_text(encoding="utf-8").splitlines()) > MOST_LINES}  # fmt: skip
    expect("files", long)


def test_functions_take_few_parameters() -> None:
    functions = named((ast.FunctionDef, ast.AsyncFunctionDef))
    many = {name for name, node in functions if len(parameters(node)) > MOST_PARAMETERS}  # type: ignore[arg-type]
    assert INDEPENDENT_OPTIONS - many == set(), "it takes few by now: remove it from INDEPENDENT_OPTIONS"
    expect("parameters", many - INDEPENDENT_OPTIONS)


def test_each_package_states_what_belongs_in_it() -> None:
    inits = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("__init__.py")]
    docstrings = {file.parent.relative_to(REPOSITORY).as_posix(): ast.get_docstring(ast.parse(file.read_text())) or ""
                  for file in inits}  # fmt: skip
    # About three lines; the one of `launcher` is the public API's documentation.
    expect("packages", {package for package, text in docstrings.items()
                        if not 3 <= len(text.splitlines()) <= 8 and package != "launcher"})  # fmt: skip
    code = {file.parent.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "launcher").rglob("*.py")}
    assert code - set(docstrings) == set(), "a package without __init__.py"


def cycles() -> set[str]:
    """Modules of each import cycle, function-level imports included, joined with ` > `."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    found: set[str] = set()
    # Tarjan's algorithm: each strongly connected component of more than one module.
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            position = stack.index(module)
            component, stack[position:] = stack[position:], []
            if len(component) > 1:
                found.add(" > ".join(sorted(component)))

    for module in sorted(imports):
        if module not in index:
            visit(module)
    return found


def test_no_modules_import_each_other() -> None:
    expect("cycles", cycles())
