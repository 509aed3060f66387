"""A metric's name with line ends, tabs or other control characters takes one line on every screen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.cli.status import format_runs
from launcher.cli.summary import _metric_lines
from launcher.core.wrapping import escape_controls
from launcher.jobs.status import RunStatus
from launcher.training.callbacks.progress_text import format_metrics, wrap_metrics
from launcher.training.callbacks.run_checkpoint import describe_unknown_monitor
from launcher.training.evaluate import _print_metrics

CONTROLS = ["\n", "\r", "\t", "\x1b[31m", "\x00", "\x07", "\x7f", "\x85", "\u2028", "\u202e", "\r\n"]


@pytest.mark.parametrize("control", CONTROLS)
def test_one_line_stays_one_line(control: str) -> None:
    name = f"train{control}loss"
    console = Console(file=io.StringIO(), width=200)
    _print_metrics("test", [{name: 1.5}], console)
    assert isinstance(console.file, io.StringIO)
    screens = [
        console.file.getvalue().rstrip("\n").split("\n"),
        [format_metrics({name: 1.5})],
        wrap_metrics({name: 1.5}, 80, 3),
        _metric_lines({name: 1.5}, 80),
        format_runs([RunStatus("it", "running", metrics={name: 1.5})], 80),
        [describe_unknown_monitor("loss", [name])],
    ]
    for lines in screens:
        assert any("train\\" in line for line in lines)
        for line in lines:
            assert line.isprintable()
            console = Console(file=io.StringIO(), width=200)
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            assert isinstance(console.file, io.StringIO)
            assert console.file.getvalue() == f"{line}\n"


@pytest.mark.parametrize("name", ["loss", "val/acc (top 5)", "損失", "précision", "a\xa0b", "λ_1"])
def test_other_names_are_not_changed(name: str) -> None:
    assert escape_controls(name) == name
