"""A hang is detected, and the rank that the others wait for is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.agent.flight_recorder import read_flight_record
from tests.distributed.test_faults import SETTINGS
from tests.support.processes import launcher, run_warm
from tests.support.runs import events_of, toy_env

pytestmark = pytest.mark.slow
# Much longer than a step on a busy machine.
HANG = ("--hang-timeout", "8", "--trainer.log_every_n_steps", "1")


def test_a_sleeping_rank_is_reported_with_its_position_and_all_stacks_are_saved(tmp_path: Path) -> None:
    arguments = (*SETTINGS, *HANG, "--model.fault", "sleep")
    output = (
        run_warm(launcher("fit", *arguments), tmp_path, env=toy_env(tmp_path / "trace"), timeout=150).check(1).output
    )

    assert re.search(r"hang: no heartbeat from any rank for \d+ s; the other ranks wait for rank 1;", output), output
    assert re.search(r"error: rank 1 \(\S+\) failed first: hung at step 3: it was in \S+faulty.py", output), output
    assert re.search(r"rank 0 \(\S+\): running at step 3, waiting in a collective", output), output
    directory = tmp_path / "runs" / "it"
    assert events_of(directory, "hang")[0]["waiting_for"] == [1]
    (folder,) = directory.glob("hang-*")
    assert "faulty.py" in (folder / "rank-1.txt").read_text()
    assert "in backward" in (folder / "rank-0.txt").read_text()
    # The flight recorder has the collective; gloo's record has the same format as NCCL's.
    absent = r"it did not enter all_reduce of \[\d+\] Float \(number \d+ of default_pg\), in which rank 0 waits"
    assert re.search(absent, output), output
    assert read_flight_record(folder / "rank-0.flight.json") is not None


def test_a_stopped_rank_is_reported_and_the_restart_finishes_the_run(tmp_path: Path) -> None:
    arguments = (*SETTINGS, *HANG, "--model.fault", "stop", "--max-restarts", "1")
    output = (
        run_warm(launcher("fit", *arguments), tmp_path, env=toy_env(tmp_path / "trace"), timeout=180).check().output
    )

    assert re.search(r"rank 1 \(\S+\) failed first: hung at step 3: it was stopped by a signal \(SIGSTOP\)", output)
    assert events_of(tmp_path / "runs" / "it", "finished")[0]["step"] == 8
