"""The README's Python code, run unchanged as scripts of a user with a package `my_pkg`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.processes import run_warm
from tests.support.runs import REPOSITORY, events_of, only_run, toy_env
from tests.support.wandb_file import history_rows

pytestmark = pytest.mark.slow

THEIRS = "from tests.support.toy import Toy as MyModule, ToyData as MyData\n"


def block(first: str) -> str:
    """The README's code block that begins with this line."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = text[text.index(f"    {first}\n") :].splitlines()
    end = next(n for n, line in enumerate(lines) if line and not line.startswith("    "))
    return textwrap.dedent("\n".join(lines[:end]))


def run_block(folder: Path, first: str) -> str:
    (folder / "my_pkg.py").write_text(THEIRS)
    (folder / "train.py").write_text(block(first))
    env = {**toy_env(folder / "trace"), "WANDB_MODE": "offline"}
    return run_warm([sys.executable, "train.py"], folder, env=env, timeout=240).check().output


def test_the_coordinators_script_trains_on_two_ranks(tmp_path: Path) -> None:
    output = run_block(tmp_path, "from launcher import TrainingCoordinator")
    (planned,) = events_of(only_run(tmp_path), "planned")
    assert planned["plan"]["world_size"] == 2
    # Both ranks print to one pipe without buffering, so lines may mix but not parts of a write.
    assert output.count("/checkpoints/") == 2, "each rank prints its result"
    assert only_run(tmp_path).joinpath("checkpoints", "last.ckpt").is_file()


def test_the_callback_logs_in_the_users_trainer(tmp_path: Path) -> None:
    run_block(tmp_path, "import lightning.pytorch as pl")
    rows = [row for row in history_rows(tmp_path) if row.get("amp/enabled")]
    # On a CPU Lightning replaces 16-mixed by bf16-mixed, which has no loss scale.
    assert rows
    assert {row["amp/precision"] for row in rows} <= {"bf16-mixed", "16-mixed"}
    assert all("perf/step_seconds" in row for row in rows)
