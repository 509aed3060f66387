"""The classes that a LightningCLI script fixes are named in the error about a file without classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.cli_script import find_cli_script
from launcher.config.loading import load_config
from launcher.core.errors import ConfigError

IMPORTS = """\
import my_pkg.data
import my_pkg as mine
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch import cli
from my_pkg.model import Model as Net, Data
from .here import Near

class Own: pass
class MyCLI(LightningCLI): pass
"""
BOTH = {"model": "my_pkg.model.Model", "data": "my_pkg.model.Data"}


@pytest.mark.parametrize(
    ("call", "classes"),
    [
        ("LightningCLI(Net, Data)", BOTH),
        ("def main():\n    LightningCLI(Net, Data, run=False)", BOTH),
        ("cli = LightningCLI(model_class=Net, datamodule_class=Data)", BOTH),
        ("cli.LightningCLI(Net, datamodule_class=Data)", BOTH),
        ("MyCLI(Net, Data)", BOTH),
        ("LightningCLI(Net)", {"model": "my_pkg.model.Model"}),
        ("LightningCLI(datamodule_class=my_pkg.data.Text)", {"data": "my_pkg.data.Text"}),
        ("LightningCLI(mine.Model)", {"model": "my_pkg.Model"}),
        ("LightningCLI(Own, Data)", {"model": "main.Own", "data": "my_pkg.model.Data"}),
        ("LightningCLI()", None),
        ("LightningCLI(Near)", None),
        ("LightningCLI(make_class(), None)", None),
        ("LightningCLI(Net).more", {"model": "my_pkg.model.Model"}),
        ("LightningCLI(", None),
    ],
)
def test_the_classes_of_a_script_are_found(tmp_path: Path, call: str, classes: dict[str, str] | None) -> None:
    (tmp_path / "main.py").write_text(f"{IMPORTS}\n{call}\n")
    (tmp_path / "other.py").write_text("print('LightningCLI')\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    script = find_cli_script(tmp_path)
    assert (None if script is None else script.classes) == classes


def test_scripts_with_different_classes_are_not_guessed_from(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"{IMPORTS}\nLightningCLI(Net)\n")
    assert find_cli_script(tmp_path) is not None
    (tmp_path / "two.py").write_text(f"{IMPORTS}\nLightningCLI(mine.Other)\n")
    assert find_cli_script(tmp_path) is None


@pytest.mark.parametrize(
    ("script", "model", "data"),
    [
        ("", "add --model my_pkg.MyClass, or model.class_path in the file",
         "add --data my_pkg.MyClass, or data.class_path in the file"),
        ("LightningCLI(Net, Data)", "main.py has the class: add --model my_pkg.model.Model",
         "main.py has the class: add --data my_pkg.model.Data"),
        ("LightningCLI(Net)", "main.py has the class: add --model my_pkg.model.Model",
         "add --data my_pkg.MyClass, or data.class_path in the file"),
    ],
)  # fmt: skip
def test_the_error_about_a_file_without_classes_has_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, model: str, data: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("main.py").write_text(f"{IMPORTS}\n{script}\n")
    Path("run.yaml").write_text("model: {hidden: 3, depth: 2}\ndata: {batch_size: 4}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["run.yaml"])
    assert [(problem.path, problem.message) for problem in caught.value.problems] == [
        ("model", f"given arguments hidden, depth without a class; {model}"),
        ("data", f"given arguments batch_size without a class; {data}"),
    ]
    named = ["--model", "my_pkg.model.Model", "--data", "my_pkg.model.Data"]
    loaded = load_config(["run.yaml"], named)
    assert loaded.model == {"class_path": "my_pkg.model.Model", "init_args": {"hidden": 3, "depth": 2}}
    assert loaded.data == {"class_path": "my_pkg.model.Data", "init_args": {"batch_size": 4}}
