"""The times that `run_started` names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.process.launch_time import VARIABLE, find_process_start, mark_launch
from launcher.runs.launch_times import list_launch_times
from launcher.runs.submission_record import FOLDER, RECORD


def _times(run: Path, env: dict[str, str], called: float | None = None) -> dict[str, float | None]:
    return list_launch_times(run, env, pid=os.getpid(), parent=None, called=called, agreement=9.0)


def test_the_start_of_a_process_is_between_those_of_its_creator_and_its_own_clock() -> None:
    before = time.time()
    code = (
        "import os, time; from launcher.process.launch_time import find_process_start as start; "
        "print(start(os.getpid()), time.time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    began, now = map(float, done.stdout.split())
    # The kernel counts in hundredths of a second.
    assert before - 0.02 <= began <= now
    assert find_process_start(2**22 + 1) is None


def test_without_a_job_only_the_launch_is_known(tmp_path: Path) -> None:
    own = find_process_start(os.getpid())
    found = _times(tmp_path, {})
    assert (found["submitted"], found["job"], found["agreement"]) == (None, None, 9.0)
    assert found["launched"] == pytest.approx(own, abs=0.02)
    assert _times(tmp_path, {}, called=7.0)["launched"] == 7.0
    env: dict[str, str] = {}
    mark_launch(env)
    assert _times(tmp_path, env)["launched"] == pytest.approx(float(env[VARIABLE]))
    # A job of the user's own, such as `salloc`, has a time before the launch that was not the run's.
    assert _times(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_JOB_START_TIME": "5"})["job"] is None


@pytest.mark.parametrize(("env", "job_id"), [
    ({"SLURM_JOB_ID": "7"}, "7"),
    ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
])  # fmt: skip
def test_a_submitted_job_has_its_times(tmp_path: Path, env: dict[str, str], job_id: str) -> None:
    folder = tmp_path / FOLDER / "1"
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps({"cluster": "slurm", "submitted": 3.5, "job_id": job_id}))
    found = _times(tmp_path, {**env, "SLURM_JOB_START_TIME": "5"})
    assert (found["submitted"], found["job"]) == (3.5, 5.0)
    other = _times(tmp_path, {"SLURM_JOB_ID": "8", "SLURM_JOB_START_TIME": "5"})
    assert (other["submitted"], other["job"]) == (None, None)


def test_a_requeued_job_of_the_users_own_has_its_start(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    assert _times(tmp_path, {**env, "SLURM_JOB_START_TIME": "5"})["job"] == 5.0
    # Older versions of SLURM do not set it.
    assert _times(tmp_path, env)["job"] is None
