"""The name of the distribution, what pyproject.toml declares, and what the wheel holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from launcher.core.distribution import DISTRIBUTION, OWN_PACKAGES, describe_install

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# `launcher` on PyPI is a stranger's: these would install it, or read its version.
_STRANGER = re.compile(
    r"(?<![\w-])launcher\[[a-z]+[\],]"
    r"|\b(?:pip|pipx|uv pip|uv tool) install (?:-\S+ )*[\"']?launcher\b"
    r"|\b(?:uv add|uvx|pipx run) (?:-\S+ )*[\"']?launcher\b"
    r"|\b(?:version|requires|distribution|metadata)\([\"']launcher[\"']\)"
)


def texts() -> Iterator[tuple[str, str]]:
    """Path and text of each file that a user reads or runs, and of the tests."""
    folders = (*OWN_PACKAGES, "docs", "tests", ".ci", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in [*files, *(path for path in ROOT.iterdir() if path.is_file())]:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in ("", ".py", ".md", ".j2", ".yaml", ".yml", ".toml", ".cff") and "fixtures" not in name:
            yield name, path.read_text(encoding="utf-8")


TEXTS = dict(texts())


def test_no_text_installs_or_reads_the_strangers_package_of_the_same_name() -> None:
    found = {name: matches for name, text in TEXTS.items() if (matches := _STRANGER.findall(text))}
    assert found.pop("launcher/doctor/checks.py") == ['version("launcher")'], "it warns of the stranger"
    found.pop("tests/unit/test_packaging.py")
    assert found == {}


@pytest.mark.parametrize(
    "text",
    ['pip install "launcher[plot]"', "pip install -U launcher", "uv add launcher", "uvx launcher", "pipx run launcher",
     "uv tool install launcher", 'version("launcher")', "launcher[plot,mlflow]"],
)  # fmt: skip
def test_a_text_with_the_strangers_package_is_found(text: str) -> None:
    assert _STRANGER.search(text)
    assert not _STRANGER.search(text.replace("launcher", DISTRIBUTION))


def test_each_extra_that_a_text_names_exists() -> None:
    declared = set(PROJECT["optional-dependencies"])
    pattern = re.compile(rf"{DISTRIBUTION}\[([\w,]+)\]|-e \"?\.\[([\w,]+)\]|describe_install\([\"'](\w+)[\"']\)")
    named = {
        extra for text in TEXTS.values() for groups in pattern.findall(text) for extra in "".join(groups).split(",")
    }
    assert {"plot", "test", "docs"} <= named <= declared


def test_the_command_for_an_extra_names_this_distribution() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert describe_install("plot") == 'pip install "training-launcher[plot]"'


def test_each_declared_python_is_tested_before_a_release() -> None:
    declared = {c.removeprefix("Programming Language :: Python :: ") for c in PROJECT["classifiers"]
                if re.search(r"Python :: 3\.\d+$", c)}  # fmt: skip
    workflow = yaml.safe_load(TEXTS[".github/workflows/release.yml"])
    assert declared == set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"])
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert declared == {f"3.{minor}" for minor in range(8, 30) if allowed.contains(f"3.{minor}")}
    assert f"Python {min(declared)} to {max(declared)}" in TEXTS["README.md"]


def test_the_command_exists_under_the_name_of_the_distribution_for_uvx_and_pipx_run() -> None:
    assert set(PROJECT["scripts"]) == {"launcher", DISTRIBUTION}
    assert len(set(PROJECT["scripts"].values())) == 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def test_the_wheel_holds_the_three_packages_with_their_files_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("training_launcher-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == set(OWN_PACKAGES)
    # Type checkers read the packages.
    assert {f"{name}/py.typed" for name in OWN_PACKAGES} <= names
    tracked = {path.relative_to(ROOT).as_posix() for name in OWN_PACKAGES for path in (ROOT / name).rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert {"launcher/loggers/base.py", "launcher/report/templates/page.css", "launcher/presets/demo.yaml"} <= tracked
    assert tracked <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_the_tests_and_the_documentation_need(built: Path) -> None:
    (archive,) = built.glob("training_launcher-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml",
            "launcher/__init__.py", "tests/conftest.py", "docs/index.md"} <= names  # fmt: skip
    assert not {name for name in names if name.startswith((".git/", "runs/", "site/"))}
