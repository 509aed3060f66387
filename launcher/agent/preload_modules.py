"""Lists the modules that the fork server imports for all ranks: libraries, and packages that the user's files import.

The user's files are parsed, not run: at module level they may read RANK, which only a rank has.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from launcher.agent.fork_server_process import USER_MODULES
from launcher.agent.script_main import ScriptTask
from launcher.config.schema import RunConfig
from strategies.registry import find_requested

# Modules that every rank imports before it trains. The fork server imports them once, and the ranks share the memory.
_LIBRARIES: tuple[str, ...] = (
    "torch", "torch.distributed", "lightning.pytorch", "torchdata.stateful_dataloader",
    "launcher.agent.rank_main", "launcher.training.fit", "launcher.hardware.devices", "launcher.hardware.rank_count",
    "launcher.user_code.classes", "launcher.user_code.loaders", "launcher.config.loading",
    "launcher.config.validation", "launcher.checkpoint.resume", "launcher.planning.first_batch",
    "launcher.planning.profile", "launcher.process.socket_folder", "launcher.training.run",
    "launcher.cli.config_commands", "launcher.cli.summary", "docstring_parser", "strategies.deterministic_ddp",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook", "torch.utils.serialization.config",
    "fsspec.implementations.chained", "launcher.agent.warm_caches",
)  # fmt: skip
# What each rank of a script needs before the script runs, and what torch imports at the first DDP model or optimizer.
_SCRIPT_MAIN: tuple[str, ...] = ("launcher.agent.rank_main", "launcher.agent.script_main")
_SCRIPT_LIBRARIES: tuple[str, ...] = ("torch", "torch.distributed", "torch.distributed.rendezvous", "torch.optim",
                                      "torch.nn.parallel", "torch.utils.data", "torch._dynamo")  # fmt: skip
# They read the rank on import; `launcher.agent.rank_main.set_rank_zero` sets it in each rank.
_PREPARED = frozenset({"torch", "lightning", "pytorch_lightning", "torchmetrics"})
# More files than users write: their folder contains a library, which each rank imports itself.
_MAX_FILES = 300
_CODE_RUNNERS = frozenset({"exec", "eval", "compile", "__import__", "setattr", "delattr"})
_ENVIRONMENT_READERS = frozenset({"os.environ.get", "os.getenv"})


def list_preload_modules(config: RunConfig, env: Mapping[str, str]) -> list[str]:
    """The libraries, `USER_MODULES`, and the installed packages that the user's files import."""
    libraries = list(_LIBRARIES)
    if config.wandb.mode != "disabled":
        libraries.append("wandb")
    # Without the variable a rank chooses DeepSpeed's accelerator first and imports DeepSpeed after that.
    strategy = find_requested(config.strategy)
    if strategy is not None and (env.get("DS_ACCELERATOR") or not strategy.needs_deepspeed):
        libraries += strategy.libraries
    settings = [config.model, config.data, dataclasses.asdict(config.trainer)]
    return [*libraries, USER_MODULES, *find_installed_imports(_class_paths(settings))]


def list_script_modules(task: ScriptTask, chosen: Sequence[str] | None) -> list[str]:
    """Modules for the ranks of a script: those that the user chose, or torch and what the script's head imports."""
    if chosen is not None or task.kind == "program":
        return _order_modules(_SCRIPT_MAIN, chosen or ())
    before = list(sys.path)
    first = Path.cwd() if task.kind == "module" else Path(task.target).resolve().parent
    # The script's own modules come first, as in the rank.
    sys.path[:] = [str(first), *task.search_path]
    try:
        reader = _ImportReader()
        reader.read_main(task.target if task.kind == "module" else Path(task.target))
    finally:
        sys.path[:] = before
    return _order_modules([*_SCRIPT_MAIN, *_SCRIPT_LIBRARIES], reader.found)


def _order_modules(libraries: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The libraries and `wanted`, whose effects are checked on import, except those of packages that are prepared."""
    prepared = [name for name in wanted if name.partition(":")[0].partition(".")[0] in _PREPARED]
    return [*libraries, *dict.fromkeys(prepared), USER_MODULES,
            *dict.fromkeys(name for name in wanted if name not in prepared)]  # fmt: skip


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "class_path" and isinstance(inner, str):
                yield inner
            else:
                yield from _class_paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _class_paths(inner)


def find_installed_imports(class_paths: Iterable[str]) -> list[str]:
    """Imports of installed packages at the head of the user's files, in the order in which they would run.

    Each is 'module', or 'module:name' for `from module import name`. Parsing stops at the first statement that may
    change a later import, such as one that sets an environment variable.
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
        """Add an installed module, or read a file of the user and the files that it imports.

        Returns whether the module is installed or does not exist.
        """
        parts = module.split(".")
        search_path: list[str] | None = None
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            spec = _find(prefix, search_path)
            if spec is None:
                return True
            if _is_installed(spec):
                self._add(module, name)
                return True
            locations = spec.submodule_search_locations
            search_path = None if locations is None else list(locations)
            if prefix not in self._seen:
                self._seen.add(prefix)
                self._read_file(prefix, spec)
        submodule = f"{module}.{name}"
        if name and search_path is not None and submodule not in self._seen and _find(submodule, search_path):
            self.read(submodule)
        return False

    def read_main(self, script: str | Path) -> None:
        """Read a script, or the module that `-m` runs: it is parsed even if it is installed, and never imported."""
        if isinstance(script, Path):
            file = script / "__main__.py" if script.is_dir() else script
            self._read_file("__main__", ModuleSpec("__main__", None, origin=str(file)))
            return
        search_path: list[str] | None = None
        parts = script.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            spec = _find(name, search_path)
            if spec is None:
                return
            locations = spec.submodule_search_locations
            search_path = None if locations is None else list(locations)
            self._seen.add(name)
            self._read_file(name, spec)
        if search_path is not None and (main := _find(f"{script}.__main__", search_path)) is not None:
            self._read_file(f"{script}.__main__", main)

    def _add(self, module: str, name: str) -> None:
        if not self._stopped and module.partition(".")[0] not in sys.stdlib_module_names:
            self.found.append(f"{module}:{name}" if name else module)

    def _read_file(self, module: str, spec: ModuleSpec) -> None:
        if spec.origin is None:
            return  # a folder without __init__.py
        package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
        try:
            tree = ast.parse(Path(spec.origin).read_bytes())
        except (OSError, SyntaxError, ValueError):
            # The rank that imports the file reports the error; an extension module cannot be parsed.
            self._stopped = True
            return
        self._stopped = self._stopped or len(self._seen) > _MAX_FILES
        names: set[str] = set()
        for statement in tree.body:
            if self._stopped:
                return
            self._read_statement(statement, package, names)

    def _read_statement(self, statement: ast.stmt, package: str, names: set[str]) -> None:
        """Read a statement at module level. `names` are the names in this file that come from installed packages."""
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
                    self._read_statement(inner, package, names)
            case ast.If() if "TYPE_CHECKING" in ast.unparse(statement.test):
                for inner in statement.orelse:
                    self._read_statement(inner, package, names)
            case ast.If() if "__name__" in ast.unparse(statement.test):
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Pass():
                return
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Assign() | ast.AnnAssign() if _assigns_names(statement) and _is_harmless(statement.value, names):
                return
            case _:
                self._stopped = True


def _assigns_names(statement: ast.Assign | ast.AnnAssign) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return all(isinstance(node, ast.Name | ast.Tuple | ast.List | ast.Store) for t in targets for node in ast.walk(t))


def _is_harmless(value: ast.expr | None, names: set[str]) -> bool:
    """Whether an expression calls only built-in or installed functions, and none that changes the environment."""
    calls = [node.func for node in ast.walk(value) if isinstance(node, ast.Call)] if value is not None else []
    return all(_is_harmless_call(function, names) for function in calls)


def _is_harmless_call(function: ast.expr, names: set[str]) -> bool:
    path = ast.unparse(function)
    if path in _ENVIRONMENT_READERS:
        return True
    root = function
    # A method of a result belongs to the function that returned it.
    while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
        root = root.func if isinstance(root, ast.Call) else root.value
    is_known = isinstance(root, ast.Constant | ast.JoinedStr)
    if isinstance(root, ast.Name):
        is_known = root.id in names or (hasattr(builtins, root.id) and root.id not in _CODE_RUNNERS)
    return is_known and "env" not in path and "chdir" not in path


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    if not statement.level:
        return statement.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - statement.level + 1]
    return ".".join([*base, *filter(None, [statement.module])])


def _find(name: str, search_path: list[str] | None) -> ModuleSpec | None:
    """Find a module without importing its parent packages."""
    if search_path is not None:
        # The full name would make Python import the parent package.
        return PathFinder.find_spec(name.rpartition(".")[2], search_path)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            spec = None if find is None else find(name, None)
        except (ImportError, OSError, ValueError):
            continue  # another library's finder
        if spec is not None:
            return spec
    return None


def _is_installed(spec: ModuleSpec) -> bool:
    """Whether a module belongs to Python, to an installed package or to the launcher."""
    if spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen") or not Path(spec.origin).is_absolute():
        return spec.origin in ("built-in", "frozen")
    if {"site-packages", "dist-packages"} & set(Path(spec.origin).parts):
        return True  # of another interpreter, through PYTHONPATH
    return os.path.realpath(spec.origin).startswith(_installed_folders())


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    return tuple(os.path.realpath(folder) + os.sep for folder in folders)
