"""The name of the distribution, what pyproject.toml declares, and what the wheel holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_type_checkers_may_read_each_package(tmp_path: Path) -> None:
    assert [name for name in OWN_PACKAGES if not (ROOT / name / "py.typed").is_file()] == []
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"{name}/py.typed" for name in OWN_PACKAGES} <= set(names)
    assert {"launcher/loggers/base.py", "launcher/report/templates/page.html.j2", "launcher/report/templates/page.css",
            "launcher/presets/demo.yaml"} <= set(names)  # fmt: skip
