"""A process that ends while it imports the user's modules reports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config.validation import parse_config
from launcher.user_code.classes import inspect_classes
from launcher.user_code.import_watch import find_class_paths
from launcher.user_code.import_watcher import describe_end
from tests.support.processes import Finished, run

PROGRAM = (
    "from launcher.user_code.import_watch import watch_imports\n"
    "from launcher.user_code.imports import import_class\n"
    "with watch_imports(['ends.Model']):\n    print(import_class('ends.Model', object, 'model.class_path'))\n"
)
LIBRARY = "import ctypes\nC = ctypes.CDLL(None)\n"
ENDED = "error: this process ended while it imported ends.Model: the module, or a library"
# The module, the exit code, and the end of the report.
CRASHED = "error: this process crashed while it imported ends.Model: "
WAYS = {
    "os._exit": ("import os\nos._exit(5)\n", 1, "ends.Model does not import: it calls os._exit(5) ({file}, line 2);"),
    "from os": ("from os import _exit\n_exit(0)\n", 1, "does not import: it calls os._exit(0) ({file}, line 2);"),
    "sys.exit": ("import sys\nsys.exit(4)\n", 1, "ends.Model does not import: SystemExit: 4 ({file}, line 2);"),
    "raises": ("raise OSError('no licence')\n", 1, "does not import: OSError: no licence ({file}, line 1);"),
    "segfault": (f"{LIBRARY}ctypes.string_at(0)\n", -11, f"{CRASHED}Segmentation fault ({{file}}, line 3);"),
    "abort": (f"{LIBRARY}C.abort()\n", -6, f"{CRASHED}Aborted ({{file}}, line 3);"),
    "exit in C": (f"{LIBRARY}C.exit(3)\n", 3, ENDED),
    "_exit in C": (f"{LIBRARY}C._exit(3)\n", 3, ENDED),
    "killed": ("import os\nos.kill(os.getpid(), 9)\n", -9, ENDED),
}


def _import(folder: Path, module: str) -> Finished:
    (folder / "ends.py").write_text(module)
    return run([sys.executable, "-c", PROGRAM], folder, env={"PYTHONPATH": str(folder)}, timeout=30)


@pytest.mark.parametrize("way", WAYS)
def test_each_end_of_the_process_is_reported_with_its_module_and_cause(tmp_path: Path, way: str) -> None:
    module, code, report = WAYS[way]
    output = _import(tmp_path, module).check(code).output
    assert report.format(file=tmp_path / "ends.py") in output


@pytest.mark.parametrize("first", ["", "import os\nif not os.fork():\n    os._exit(3)\nos.wait()\n"])
def test_an_import_that_ends_normally_is_not_reported(tmp_path: Path, first: str) -> None:
    assert _import(tmp_path, f"{first}class Model: ...\n").check().output == "<class 'ends.Model'>\n"


def test_os_exit_ends_the_process_again_after_the_import(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("from os import _exit\nclass Model:\n    end = _exit\n")
    program = f"{PROGRAM}import ends\nends.Model.end(7)\n"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=30, check=False).returncode == 7


def test_a_nested_class_whose_module_ends_the_process_is_a_problem_of_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outer.py").write_text(
        "import torch\nfrom lightning.pytorch.demos.boring_classes import BoringModel\n\n\n"
        "class Model(BoringModel):\n    def __init__(self, net: torch.nn.Module | None = None):\n"
        "        super().__init__()\n"
    )
    (tmp_path / "inner_exits.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {"class_path": "outer.Model", "init_args": {"net": {"class_path": "inner_exits.Net"}}}
    (problem,) = inspect_classes(parse_config({"model": spec})).problems
    assert problem.path == "model.init_args.net"
    assert f"it calls os._exit(3) ({tmp_path / 'inner_exits.py'}, line 2)" in problem.message


def test_the_report_names_the_import_that_was_not_done() -> None:
    libraries = ("/usr/lib/python3/",)
    text = "importing a.A, b.B\nimporting b.B\nFatal Python error: Aborted\n\nCurrent thread:\n"
    frames = '  File "/usr/lib/python3/ctypes.py", line 5 in f\n  File "/home/b.py", line 9 in <module>\n'
    assert describe_end("importing a.A\ndone\n", libraries) is None
    report = describe_end(text + frames, libraries)
    assert report is not None
    assert "imported b.B: Aborted (/home/b.py, line 9);" in report


def test_all_class_paths_of_the_settings_are_found() -> None:
    nested = {"class_path": "a.A", "init_args": {"net": {"class_path": "b.B"}, "more": [{"class_path": "c.C"}]}}
    assert [*find_class_paths({"model": nested, "seed": 4, "data": None})] == ["a.A", "b.B", "c.C"]
