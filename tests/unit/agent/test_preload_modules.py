"""Imports at the head of the user's files, found without running them."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from launcher.agent.fork_server_process import USER_MODULES
from launcher.agent.preload_modules import find_installed_imports, list_script_modules
from launcher.agent.script_main import ScriptTask


def _files(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__slash__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Running the file fails.
        path.write_text(textwrap.dedent(text) + "\nfails = 1 / 0\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_own_files_are_followed_and_installed_packages_are_listed(folder: Path) -> None:
    _files(
        folder,
        mine="""
            from __future__ import annotations
            import os
            import numpy as np
            from rich import table, print as show
            from parts.layers import Layer
            import helpers
            def later():
                import pandas
            class Model:
                import yaml
        """,
        helpers="import questionary.prompts\nimport mine",
        parts__slash____init__="from packaging import version",
        parts__slash__layers="from . import deep\nfrom .deep import x\nfrom torch import *",
        parts__slash__deep="import jsonargparse",
    )
    assert find_installed_imports(["mine.Model", "mine.Data", "lightning.pytorch.callbacks.Timer"]) == [
        "numpy",
        "rich:table",
        "rich:print",
        "packaging:version",
        "jsonargparse",
        "torch",
        "questionary.prompts",
        "lightning.pytorch.callbacks:Timer",
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "'''Text.'''",
        "RANK = int(os.environ.get('RANK', '0'))",
        "LOCAL_RANK: int = int(os.environ['LOCAL_RANK'])",
        "logger = logging.getLogger(__name__)",
        "FOLDER = Path(__file__).parent / 'data'",
        "WIDTH, DEPTH = 3, [4]",
        "NAMES = ', '.join(sorted({'a'}))",
        "if __name__ == '__main__':\n    os.environ['X'] = '1'",
        "if TYPE_CHECKING:\n    import pandas",
        "try:\n    import absent\nexcept ImportError:\n    absent = None",
        "@functools.cache\ndef f(): os.environ['X'] = '1'",
        "import os.path, absent_package",
    ],
)
def test_parsing_continues_after_a_statement_without_effects(statement: str, folder: Path) -> None:
    head = "import functools, logging, os\nfrom pathlib import Path\nfrom typing import TYPE_CHECKING\n"
    _files(folder, quiet=f"{head}{statement}\nimport numpy")
    found = find_installed_imports(["quiet.Model"])
    assert "numpy" in found
    assert "pandas" not in found


@pytest.mark.parametrize(
    "statement",
    [
        "os.environ['OMP_NUM_THREADS'] = '4'",
        "os.environ.setdefault('HF_HOME', '/data')",
        "old = os.environ.pop('HF_HOME', None)",
        "done = load_environment()",
        "load_environment()",
        "sys.path.insert(0, '/elsewhere')",
        "set_up()",
        "STATE = set_up()",
        "torch.backends.cudnn.benchmark = True",
        "if DEBUG:\n    import pandas",
        "with open('x') as f: pass",
        "for i in range(3): pass",
        "del os",
        "X = [os.chdir(p) for p in ('/',)]",
        "X = exec('import sys')",
    ],
)
def test_parsing_stops_at_a_statement_that_may_change_an_import(statement: str, folder: Path) -> None:
    head = "import os, sys, torch\nfrom not_installed_here import load_environment\ndef set_up(): ...\n"
    # In another file too.
    _files(folder, loud=f"{head}{statement}\nimport numpy", main="import loud\nimport yaml", first="import rich")
    assert find_installed_imports(["first.Model", "main.Model"]) == ["rich", "torch"]


def test_files_that_cannot_be_parsed_are_skipped(folder: Path) -> None:
    (folder / "broken.py").write_text("import numpy\nclass Model(:\n")
    (folder / "nothing_here").mkdir()
    assert find_installed_imports(["broken.Model"]) == []
    assert find_installed_imports(["absent.Model", "nothing_here.absent.Model", "Bare", "numpy.absent.Model"]) == [
        "numpy.absent:Model"
    ]


def test_a_folder_without_an_init_file_belongs_to_the_user(folder: Path) -> None:
    _files(folder, project__slash__models__slash__net="import numpy")
    assert find_installed_imports(["project.models.net.Model"]) == ["numpy"]


def test_a_users_file_hides_an_installed_package_of_the_same_name(folder: Path) -> None:
    _files(folder, wandb="import yaml", mine="import wandb")
    assert find_installed_imports(["mine.Model"]) == ["yaml"]


def _preloaded(task: ScriptTask, chosen: list[str] | None = None) -> list[str]:
    modules = list_script_modules(task, chosen)
    assert "launcher.agent.script_main" in modules[: modules.index(USER_MODULES)]
    return modules[modules.index(USER_MODULES) + 1 :]


def test_a_scripts_head_decides_what_is_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _files(
        tmp_path,
        scripts__slash__train="""
            import yaml
            import rich, helpers
            if __name__ == "__main__":
                import pandas
        """,
        scripts__slash__helpers="import packaging.version",
        # The working directory is not on the path of a script.
        helpers="import questionary",
        pkg__slash____init__="import jsonargparse",
        pkg__slash__train="from . import data\nimport psutil",
        pkg__slash__data="import docstring_parser",
        pkg__slash____main__="import submitit",
    )
    path = tuple(sys.path)
    assert _preloaded(ScriptTask("file", "scripts/train.py", (), path)) == ["yaml", "rich", "packaging.version"]
    assert _preloaded(ScriptTask("module", "pkg.train", (), path)) == ["jsonargparse", "docstring_parser", "psutil"]
    assert _preloaded(ScriptTask("module", "pkg", (), path)) == ["jsonargparse", "submitit"]
    assert _preloaded(ScriptTask("program", "sh", (), path)) == []
    assert tuple(sys.path) == path
    assert "torch" in list_script_modules(ScriptTask("file", "scripts/train.py", (), path), None)
    assert _preloaded(ScriptTask("file", "scripts/train.py", (), path), ["yaml", "torch"]) == ["yaml"]
    # Its import reads the rank, which `set_rank_zero` corrects in each rank.
    lightning = list_script_modules(ScriptTask("file", "scripts/train.py", (), path), ["lightning.pytorch"])
    assert lightning[-2:] == ["lightning.pytorch", USER_MODULES]
    assert "torch" not in list_script_modules(ScriptTask("file", "scripts/train.py", (), path), [])
