"""A possible hang is reported long before its limit, with the rank behind; nothing is ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.hang_watch import SHORTEST_VARIABLE
from launcher.core.events import read_events
from tests.support.processes import Finished, launcher, run_warm
from tests.support.runs import REPOSITORY, events_of

pytestmark = pytest.mark.slow
# Seconds. Much longer than a step on a busy machine.
NOTICE = "3"


def _train(folder: Path, fault: str, arguments: Sequence[str] = (), *, kill: bool = False) -> Finished:
    """Train on two ranks, with a fault of rank one; `kill` ends all processes after the first notice."""
    command = ("--nproc-per-node", "2", "--name", "it", "--wandb.mode", "disabled", "--accelerator", "cpu",
               "--model", "tests.support.hanging.Hanging", "--model.fault", fault, "--model.at", "15",
               "--data", "tests.support.hanging.HangingData", "--data.fault", fault, "--data.at", "15",
               "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "-1", *arguments)  # fmt: skip

    def on_line(line: str, group: int) -> None:
        if kill and "possible hang" in line:
            os.killpg(group, signal.SIGKILL)

    env = {SHORTEST_VARIABLE: NOTICE, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return run_warm(launcher("fit", *command), folder, env=env, timeout=120, on_line=on_line)


def _notices(folder: Path) -> list[dict[str, Any]]:
    events = read_events(folder / "runs" / "it" / "events.jsonl")
    return [event for event in events if event["kind"].startswith("hang")]


def test_a_rank_that_goes_on_by_itself_is_reported_once(tmp_path: Path) -> None:
    ended = _train(tmp_path, "sleep_hook,sleep_hook", ("--model.seconds", "7", "--trainer.max_steps", "40")).check()

    found = _notices(tmp_path)
    assert [event["kind"] for event in found] == ["hang_suspected", "hang_over"], ended.output
    assert found[0]["ranks"] == [1]
    assert found[0]["waiting"] == [0]
    assert found[0]["waits_for"] == {"1": "sleeping"}
    assert "hanging.py" in found[0]["frames"]["1"][0]
    assert found[0]["message"] in ended.output
    assert found[1]["message"] in ended.output
    assert events_of(tmp_path / "runs" / "it", "finished")[0]["step"] == 40


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("loader", "rank 1 is waiting for its loader workers; it did not enter all_reduce"),
        ("gather", "it entered all_gather"),
        ("write", "rank 1 is waiting for the other end of a pipe in"),
    ],
)
def test_the_rank_behind_is_named_with_its_cause(tmp_path: Path, fault: str, text: str) -> None:
    output = _train(tmp_path, fault, ("--trainer.max_steps", "100000"), kill=True).output

    (event,) = _notices(tmp_path)
    assert (event["kind"], event["ranks"]) == ("hang_suspected", [1]), output
    assert text in event["message"]
    assert event["message"] in output
