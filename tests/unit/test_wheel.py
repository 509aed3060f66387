"""What the wheel holds."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.core.distribution import OWN_PACKAGES

ROOT = Path(__file__).resolve().parents[2]


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
