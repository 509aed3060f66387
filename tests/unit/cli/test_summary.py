"""The summary at the end of a run."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.cli.summary import print_summary
from launcher.training.result import FitResult


def print_to_text(tmp_path: Path) -> str:
    stream = io.StringIO()
    none: Any = None  # the plan is not used
    result = FitResult(run=tmp_path / "runs" / "it", plan=none, steps=3, metrics={"loss": 0.5}, checkpoint=None)
    print_summary(result, Console(file=stream, width=200))
    return stream.getvalue()


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_for_the_report_can_be_pasted_with_and_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    (line,) = [line for line in print_to_text(tmp_path).splitlines() if line.startswith("report")]
    command = "python -m launcher report runs/it"
    assert line.split(maxsplit=1)[1].rstrip() == (
        command if installed else f'pip install "training-launcher[plot]" && {command}'
    )
