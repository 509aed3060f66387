"""Mutation testing: which modules it covers, and that its last score is written down with every survivor."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = {f"strategies/{name}.py" for name in ("precision_names", "precision_agreement", "deepspeed_precision", "batch",
                                             "choice")}  # fmt: skip
MONITORING = {f"launcher/monitoring/{name}.py" for name in ("samples", "health", "step_timer", "loss_scale_monitor",
                                                            "amp_callback")}  # fmt: skip
CALLBACK = {"strategies/loss_scale.py", "launcher/loggers/row_queue.py", *MONITORING}


@pytest.mark.case(50)
def test_the_pure_modules_and_the_callback_are_mutated_and_their_tests_named() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert set(settings["only_mutate"]) >= PURE | CALLBACK
    files = [*settings["only_mutate"], *settings["pytest_add_cli_args_test_selection"]]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert "python -m tests.mutation" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.case(50)
def test_the_recorded_score_is_at_least_95_percent_and_each_survivor_has_a_reason() -> None:
    text = (ROOT / "tests" / "mutation.md").read_text()
    (found,) = re.findall(r"^\*\*(\d{4}-\d\d-\d\d): (\d+) of (\d+) mutants detected, ([\d.]+) %\.\*\*$", text, re.M)
    date, detected, total, percent = found
    datetime.date.fromisoformat(date)
    assert float(percent) == round(100 * int(detected) / int(total), 1)
    assert float(percent) >= 95
    survivors = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*$", text, re.M)]
    assert sum(int(number) for _, number, _ in survivors) == int(total) - int(detected)
    assert all(reason for _, _, reason in survivors)
