"""`slurm.environment`: the variables of a task."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm.environment import SlurmEnvironmentError, SlurmTask, read_slurm_task

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_RESTART_COUNT": "2",
}


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_ID": "4711"}, {"SLURM_PROCID": "0"}, {"SLURM_NTASKS": "4"}])
def test_outside_of_a_step_there_is_no_task(env: dict[str, str]) -> None:
    assert read_slurm_task(env) is None


def test_a_step_gives_its_task() -> None:
    assert read_slurm_task(STEP) == SlurmTask(job_id="4711", task=3, tasks=4, node=1, restart_count=2, step="0")


def test_a_job_that_was_never_requeued_has_no_restart() -> None:
    task = read_slurm_task({k: v for k, v in STEP.items() if k != "SLURM_RESTART_COUNT"})
    assert task is not None
    assert task.restart_count == 0


def test_a_batch_script_is_one_task_for_any_request() -> None:
    task = read_slurm_task({"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NODEID": "0"})
    assert task is not None
    assert task.tasks == 1


def test_a_step_without_a_count_uses_that_of_the_job() -> None:
    env = {k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"} | {"SLURM_NTASKS": "8"}
    task = read_slurm_task(env)
    assert task is not None
    assert task.tasks == 8


def test_a_step_without_any_count_is_an_error() -> None:
    with pytest.raises(SlurmEnvironmentError, match="SLURM_STEP_NUM_TASKS=not set"):
        read_slurm_task({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"})


def test_the_error_lists_every_wrong_variable() -> None:
    with pytest.raises(SlurmEnvironmentError) as caught:
        read_slurm_task({**STEP, "SLURM_PROCID": "-1", "SLURM_NODEID": "n1", "SLURM_RESTART_COUNT": ""})
    assert all(
        text in str(caught.value) for text in ("SLURM_PROCID='-1'", "SLURM_NODEID='n1'", "SLURM_RESTART_COUNT=''")
    )
    assert "SLURM_STEP_NUM_TASKS" not in str(caught.value)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*STEP, "SLURM_NTASKS"]), st.text(max_size=3) | st.integers(0, 99).map(str)))
def test_any_environment_gives_a_task_or_none_or_one_error(env: dict[str, str]) -> None:
    try:
        task = read_slurm_task(env)
    except SlurmEnvironmentError:
        return
    assert (task is None) == ("SLURM_JOB_ID" not in env or "SLURM_PROCID" not in env)
