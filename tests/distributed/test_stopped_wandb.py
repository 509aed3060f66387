"""W&B's process is stopped during a real training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import run_warm
from tests.support.runs import REPOSITORY
from tests.support.stopped_wandb import ENOUGH
from tests.support.wandb_file import alerts, history_rows

pytestmark = pytest.mark.slow


@pytest.mark.case(41)
def test_training_continues_with_a_stopped_wandb_and_every_row_is_written_or_counted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.stopped_wandb", str(tmp_path)]
    run_warm(command, tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, timeout=240).check()
    seen = json.loads((tmp_path / "seen.json").read_text())

    # The training continued while W&B accepted no rows.
    assert seen["steps"] >= ENOUGH
    assert seen["dropped"] == seen["in_the_end"] >= ENOUGH
    rows = [row["trainer/global_step"] for row in history_rows(tmp_path) if "amp/enabled" in row]
    summary = 1
    assert len(rows) + len(alerts(tmp_path)) + seen["dropped"] == seen["rows"] + seen["alerted"] + summary
    assert rows == sorted(set(rows))
    assert seen["notices"] == [
        f"W&B did not accept {seen['dropped']} rows and alerts of the loss scale; training was not delayed"
    ]
