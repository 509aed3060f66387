"""`launcher submit --sweep --cluster local`: members on this machine, inspected and cancelled by the sweep's name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.process.background import is_running
from launcher.runs.sweep_record import read_arrays
from tests.support.processes import Finished, launcher, run
from tests.support.runs import REPOSITORY, TOY
from tests.support.slurm_cluster import wait_until

pytestmark = pytest.mark.slow
MODEL = (*TOY, "--model", "tests.support.slurm_paced.PacedToy", "--accelerator", "cpu", "--devices", "1", "--name", "s",
         "--trainer.max_epochs", "1", "--checkpoint.monitor", "loss", "--cluster", "local")  # fmt: skip
SWEEP = ("--sweep", "model.init_args.lr=0.01,0.05")


def _launch(cwd: Path, *given: str, pace: str = "0") -> Finished:
    return run(launcher(*given), cwd, env={"PACE": pace, "PYTHONPATH": str(REPOSITORY)}, timeout=120)


def _members(cwd: Path) -> list[dict[str, Any]]:
    return json.loads(_launch(cwd, "status", "s", "--json").check().output)


def _wait(cwd: Path) -> None:
    """Wait for the background process, which no fixture tracks; end it if it takes too long."""
    record = read_arrays(cwd / "runs" / "s")[-1]
    try:
        wait_until("the end", lambda: not is_running(record["pid"], record["started"]), 200)
    finally:
        if is_running(record["pid"], record["started"]):
            os.killpg(record["pid"], signal.SIGKILL)


def test_the_members_run_one_after_another_and_share_one_table(tmp_path: Path) -> None:
    assert "runs 2 members in the background" in _launch(tmp_path, "submit", *MODEL, *SWEEP).check().output
    states = [member["run"]["state"] for member in _members(tmp_path)]
    assert states in (["queued", "queued"], ["running", "queued"])
    assert "has not begun; cancel its sweep" in _launch(tmp_path, "cancel", "s-1").check(1).output
    _wait(tmp_path)
    one, two = _members(tmp_path)
    assert [member["run"]["state"] for member in (one, two)] == ["done", "done"]
    assert one["run"]["step"] == two["run"]["step"] == 16
    assert one["last"] is not None
    assert one["last"] != two["last"], "each has its own learning rate"
    starts = [json.loads((tmp_path / f"runs/s-{n}/events.jsonl").read_text().splitlines()[0])["time"] for n in (0, 1)]
    ends = [json.loads((tmp_path / f"runs/s-{n}/events.jsonl").read_text().splitlines()[-1])["time"] for n in (0, 1)]
    assert starts[1] > ends[0]


def test_a_cancelled_sweep_saves_the_running_member_and_starts_no_other(tmp_path: Path) -> None:
    _launch(tmp_path, "submit", *MODEL, *SWEEP, pace="0.5").check()
    events = tmp_path / "runs/s-0/events.jsonl"
    wait_until("the training", lambda: events.exists() and '"training_started"' in events.read_text(), 120)
    assert "asked to save and stop" in _launch(tmp_path, "cancel", "s").check().output
    _wait(tmp_path)
    one, two = _members(tmp_path)
    assert one["run"]["state"] == "stopped"
    assert one["run"]["checkpoint_step"] == one["run"]["step"] > 0
    assert (two["run"]["state"], two["run"]["detail"]) == ("ended", "its sweep ended before it began")
