"""The check of the source agrees with the import wherever it decides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config.validation import parse_config
from launcher.user_code.source_check import is_surely_wrong

_MODULE = """
import lightning.pytorch as pl
from other_place import Imported
from other_place import Original as Renamed
if True:
    class Conditional(pl.LightningModule): ...
try:
    class Tried: ...
except ImportError:
    Fallback = None
Assigned = make()
A, (B, C) = 1, (2, 3)
class Model(pl.LightningModule):
    def __init__(self, lr=0.1, *, width=3): ...
class Open(pl.LightningModule):
    def __init__(self, lr=0.1, **kwargs): ...
class Child(Model): ...
@decorated
class Decorated:
    def __init__(self, lr): ...
def function(): ...
"""


def is_wrong(path: str, field: str = "model", **init_args: Any) -> bool:
    spec = {"class_path": path, "init_args": init_args}
    return is_surely_wrong(parse_config({"model": {"class_path": "scanned.Model"}, field: spec}))


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scanned.py").write_text(_MODULE)
    (tmp_path / "starred.py").write_text("from other_place import *")
    (tmp_path / "lazy.py").write_text("def __getattr__(name): ...")
    (tmp_path / "made.py").write_text("globals()['Model'] = 3")
    (tmp_path / "broken.py").write_text("class Model(:")
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "inner" / "__init__.py").touch()
    (tmp_path / "package" / "open").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from package.inner.deep import Deep")
    (tmp_path / "package" / "inner" / "deep.py").write_text("class Deep: ...")


@pytest.mark.parametrize("name", ["Imported", "Renamed", "Conditional", "Tried", "Fallback", "Assigned", "A", "C",
                                  "Model", "Open", "Child", "Decorated", "function"])  # fmt: skip
def test_a_name_in_the_module_is_accepted(name: str) -> None:
    assert not is_wrong(f"scanned.{name}")
    assert is_wrong(f"scanned.{name}x")


@pytest.mark.parametrize("path", ["starred.X", "lazy.X", "made.Model", "package.Deep", "package.inner.deep.Deep",
                                  "package.open.deep.Deep",
                                  "os.path.X", "math.X", "torch.nn.Linear", "lightning.pytorch.LightningModule",
                                  "lightning.pytorch.demos.boring_classes.BoringModel", "short"])  # fmt: skip
def test_what_only_an_import_shows_is_accepted(path: str) -> None:
    assert not is_wrong(path)


@pytest.mark.parametrize(
    "path", ["nowhere.X", "nowhere.deep.X", "broken.Model", "package.Deeper", "package.inner.deep.X"]
)
def test_a_missing_module_or_name_is_found(path: str) -> None:
    assert is_wrong(path)
    assert is_wrong(path, "data")


def test_a_module_that_only_the_nodes_have_is_accepted() -> None:
    for path, expected in (("nowhere.X", False), ("package.Deeper", True)):
        config = parse_config({"model": {"class_path": path}})
        assert is_surely_wrong(config, has_all_modules=False) == expected


def test_a_missing_argument_is_found_where_the_class_lists_all() -> None:
    assert not is_wrong("scanned.Model", lr=1, width=2)
    assert is_wrong("scanned.Model", lrr=1)
    for name in ("Open", "Child", "Decorated", "Imported"):
        assert not is_wrong(f"scanned.{name}", lrr=1)


def test_nothing_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from launcher.config.loading import load_config\n"
        "from launcher.user_code.source_check import is_surely_wrong\n"
        "assert is_surely_wrong(load_config([], ['--model', 'package.inner.deep.Dep']))\n"
        "assert not {'package', 'torch', 'lightning'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
