"""The wheel in clean environments, as `pip install`, `uv add`, `uv tool` and `uvx` make them, without a download.

Wheels without modules stand in for the dependencies, with the names and versions that are installed here, so that
resolving is real. The modules themselves are found through PYTHONPATH.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launcher.core.distribution import DISTRIBUTION, __version__
from tests.support.processes import Finished, run
from tests.support.runs import REPOSITORY

pytestmark = pytest.mark.slow
ANSWER = f"launcher {__version__}"


@dataclass(frozen=True)
class Index:
    """A folder of wheels that replaces the package index, and uv's cache."""

    folder: Path
    wheel: Path

    def uv(self, command: str, cwd: Path) -> Finished:
        """Run a command of uv, without spaces in its arguments."""
        env = {
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "UV_PYTHON": sys.executable,
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_CACHE_DIR": str(self.folder.parent / "cache"),
            "UV_TOOL_DIR": str(self.folder.parent / "tools"),
            "UV_TOOL_BIN_DIR": str(self.folder.parent / "tools" / "bin"),
            "UV_OFFLINE": "1",
            "UV_NO_INDEX": "1",
            "UV_FIND_LINKS": str(self.folder),
            "VIRTUAL_ENV": "",
        }
        uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
        return run([uv, *command.split()], cwd, env=env)


def write_stand_in(folder: Path, requirement: Requirement) -> None:
    """A wheel with metadata only; none if the dependency is not installed here."""
    try:
        version = importlib.metadata.version(requirement.name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return
    name = re.sub(r"[-_.]+", "_", requirement.name).lower()
    information = f"{name}-{version}.dist-info"
    extras = "".join(f"Provides-Extra: {extra}\n" for extra in requirement.extras)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{information}/METADATA",
                       f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {version}\n{extras}")  # fmt: skip
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    pytest.importorskip("uv")
    folder = tmp_path_factory.mktemp("packages") / "index"
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in (*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())):
        if Requirement(text).name != DISTRIBUTION:
            write_stand_in(folder, Requirement(text))
    return Index(folder, wheel)


def test_pip_install_gives_both_commands_and_the_module(index: Index, tmp_path: Path) -> None:
    index.uv("venv env", tmp_path).check()
    index.uv(f"pip install --python env {DISTRIBUTION}", tmp_path).check()
    installed = tmp_path / "env" / "bin"
    env = {"PYTHONPATH": sysconfig.get_path("purelib")}
    for command in ("launcher", DISTRIBUTION):
        assert run([str(installed / command), "--version"], tmp_path, env=env).check().output.strip() == ANSWER
    shown = run([str(installed / "python"), "-m", "launcher", "plan", "--help"], tmp_path, env=env).check().output
    assert shown.startswith("usage: launcher plan")
    code = "import launcher, slurm, strategies; print(launcher.__file__, slurm.__file__, strategies.__file__)"
    imported = run([str(installed / "python"), "-c", code], tmp_path, env=env).check().output.split()
    assert len(imported) == 3
    assert all(Path(file).is_relative_to(tmp_path / "env") for file in imported)


def test_uv_add_makes_it_a_dependency_of_a_project(index: Index, tmp_path: Path) -> None:
    index.uv("init --bare --no-workspace --name project", tmp_path).check()
    index.uv(f"add {DISTRIBUTION}", tmp_path).check()
    assert f'"{DISTRIBUTION}' in (tmp_path / "pyproject.toml").read_text()
    assert index.uv("run launcher --version", tmp_path).check().output.strip().endswith(ANSWER)


def test_uvx_runs_it_by_its_name(index: Index, tmp_path: Path) -> None:
    assert index.uv(f"tool run -q {DISTRIBUTION} --version", tmp_path).check().output.strip() == ANSWER
    assert index.uv(f"tool run -q --from {index.wheel} launcher --version", tmp_path).check().output.strip() == ANSWER


@pytest.mark.parametrize("extra", ["plot", "mlflow", "test"])
def test_the_versions_of_an_extra_that_are_tested_here_can_be_installed(
    index: Index, tmp_path: Path, extra: str
) -> None:
    index.uv("venv env", tmp_path).check()
    output = index.uv(f"pip install --dry-run --python env {DISTRIBUTION}[{extra}]", tmp_path).check().output
    needed = {"plot": {"matplotlib"}, "mlflow": {"mlflow-skinny"}, "test": {"matplotlib", "mlflow-skinny", "pytest"}}
    assert {f"+ {name}==" for name in needed[extra]} <= {line.strip().partition("==")[0] + "==" for line in
                                                         output.splitlines()}  # fmt: skip


def test_the_other_package_of_the_name_does_not_replace_the_module(index: Index, tmp_path: Path) -> None:
    """`launcher` 0.1 of PyPI holds one script, `launcher`."""
    stranger = tmp_path / "launcher-0.1-py3-none-any.whl"
    with zipfile.ZipFile(stranger, "w") as wheel:
        wheel.writestr("launcher-0.1.data/scripts/launcher", "#!python\nprint('the other')\n")
        wheel.writestr("launcher-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: launcher\nVersion: 0.1\n")
        wheel.writestr("launcher-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("launcher-0.1.dist-info/RECORD", "")
    index.uv("venv env", tmp_path).check()
    index.uv(f"pip install --python env --no-deps {DISTRIBUTION} {stranger}", tmp_path).check()
    python = str(tmp_path / "env" / "bin" / "python")
    env = {"PYTHONPATH": sysconfig.get_path("purelib")}
    assert run([python, "-m", "launcher", "--version"], tmp_path, env=env).check().output.strip() == ANSWER
    code = "from launcher.doctor.checks import check_command; print(next(iter(check_command())).found)"
    assert "'launcher' 0.1 is installed too" in run([python, "-c", code], tmp_path, env=env).check().output
