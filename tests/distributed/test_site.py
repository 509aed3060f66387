"""The documentation site: built strictly, self-contained, and readable on wide and narrow screens."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.browser import browser
from tests.support.documentation import REPOSITORY

pytestmark = pytest.mark.slow

_LOADED = re.compile(r'<(?!a\b)[a-z]+[^>]*\s(?:src|href)="((?:https?:)?//[^"]*)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        reason = 'needs mkdocs: pip install -e ".[docs]"'
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_no_page_loads_files_from_other_hosts(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = {page.name: _LOADED.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert {name: found for name, found in loaded.items() if found} == {}
    assert not [page for page in pages if "<!-- generate:" in page.read_text(encoding="utf-8")]


def test_pages_fit_wide_and_narrow_screens(site: Path, tmp_path: Path) -> None:
    """No page is wider than its window, every image loads, and nothing is requested from the network."""
    wrong: list[str] = []
    with browser(tmp_path / "profile") as page:
        for file in sorted(site.rglob("*.html")):
            if file.name == "404.html":  # its paths begin at the root of a web server
                continue
            for width in (1280, 400):
                page.open(file)
                page.show_as("light", width=width)
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    wrong.append(f"{file.name}: wider than {width}")
                missing = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src).join()")
                wrong += [f"{file.name}: missing image {missing}"] if missing else []
        requests = [request for request in page.requests if not request.startswith(("file:", "data:"))]
    assert wrong == []
    assert requests == []
