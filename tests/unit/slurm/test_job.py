"""The options of a job: reading, errors, and no shell syntax in a script."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.job import (
    JobRequestError,
    SlurmJob,
    find_contradictions,
    list_job_options,
    read_job,
    read_minutes,
    select_exported_names,
)
from slurm.render import JobExecutor, make_submission_parameters


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("30", 30), ("90:00", 90), ("0:90", 2), ("01:30:00", 90), ("1:00:01", 61), ("2-0", 2880), ("1-12", 2160),
     ("1-00:30", 1470), ("2-03:04:05", 3065), ("", None), ("1:2:3:4", None), ("-5", None), ("1d", None),
     ("UNLIMITED", None), ("0", 0)],
)  # fmt: skip
def test_time_limits_in_the_forms_of_sbatch(text: str, minutes: int | None) -> None:
    assert read_minutes(text) == minutes


def test_a_job_has_the_options_of_sbatch() -> None:
    given = {"partition": "a,b", "nodes": "2", "gpus-per-node": "8", "time": "1-0", "mem": "64G",
             "mail-type": "END,FAIL", "mail-user": "a.b@c.org", "constraint": "[a100|h100]", "exclude": "n[01-03]",
             "dependency": "afterok:12:13", "qos": None, "signal": "SIGUSR1"}  # fmt: skip
    assert read_job("it", given, ["PATH", "HOME", "PATH"]) == SlurmJob(
        name="it", partition="a,b", nodes=2, gpus_per_node=8, time=1440, mem="64G", mail_type="END,FAIL",
        mail_user="a.b@c.org", constraint="[a100|h100]", exclude="n[01-03]", dependency="afterok:12:13", signal="USR1",
        environment=("HOME", "PATH"),
    )  # fmt: skip


def test_the_error_lists_every_wrong_option() -> None:
    wrong = {
        "nodes": "0",
        "gpus-per-node": "many",
        "time": "soon",
        "mem": "lots of",
        "signal": "TERM",
        "partition": "a b",
    }
    with pytest.raises(JobRequestError) as refused:
        read_job("it", wrong, ["A=1"])
    assert [problem.option for problem in refused.value.problems] == [*wrong, "export-env"]
    assert all("given" in problem.message and "expected" in problem.message for problem in refused.value.problems)


TEXTS = sorted(set(list_job_options()) - {"nodes", "gpus-per-node", "cpus-per-task", "signal-delay", "time", "signal"})
SHELL_SYNTAX = [
    "a\nrm -rf /",
    "a;touch x",
    "$(touch x)",
    "`touch x`",
    "a'b",
    'a"b',
    "a b",
    "ä",
    "",
    "a\0b",
    "--wrap=x y",
    "a\\",
]


@pytest.mark.parametrize("option", TEXTS)
@pytest.mark.parametrize("text", SHELL_SYNTAX)
def test_shell_syntax_is_rejected(option: str, text: str) -> None:
    with pytest.raises(JobRequestError, match=option):
        read_job("it", {option: text})


@given(st.sampled_from(TEXTS), st.text())
def test_an_accepted_text_is_one_argument_on_one_line(option: str, text: str) -> None:
    try:
        job = read_job("it", {option: text})
    except JobRequestError:
        return
    line = next(part for part in _script(job).splitlines() if part.startswith(f"#SBATCH --{option}="))
    assert shlex.split(line.removeprefix("#SBATCH ")) == [f"--{option}={text}"]


def _script(job: SlurmJob, folder: str = "/runs/it/submissions/1") -> str:
    return JobExecutor(job, Path(folder), "/usr/bin/python3").batch_script()


def test_the_script_has_one_task_per_node_the_warning_and_the_variables() -> None:
    lines = _script(SlurmJob("it", nodes=2, gpus_per_node=8, time=90, environment=("HOME", "PATH"))).splitlines()
    for wanted in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=90", "--signal=USR2@120",
                   "--requeue", "--export=HOME,PATH", "--job-name=it", "--open-mode=append"):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines
    assert not any("wckey" in line for line in lines)
    assert "export SUBMITIT_PREEMPT_SIGNAL=USR2" in lines


def test_without_a_time_the_limit_of_the_partition_applies() -> None:
    assert "--time" not in _script(SlurmJob("it"))


def test_the_script_is_valid_bash_for_any_folder(tmp_path: Path) -> None:
    script = _script(SlurmJob("it"), "/runs of 'mine'/$(touch x);é/it")
    done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    last = next(line for line in script.splitlines() if line.startswith("srun"))
    assert shlex.split(last)[-1] == "/runs of 'mine'/$(touch x);é/it"


def test_a_chosen_signal_is_set_for_sbatch_and_submitit() -> None:
    parameters = make_submission_parameters(SlurmJob("it", signal="USR1", signal_delay=300))
    assert parameters["additional_parameters"]["signal"] == "USR1@300"
    assert parameters["setup"] == ["export SUBMITIT_PREEMPT_SIGNAL=USR1"]


def test_all_contradicting_numbers_are_reported() -> None:
    job = SlurmJob("it", nodes=3, gpus_per_node=8, time=1)
    found = find_contradictions(job, devices=4, num_nodes=2, global_batch_size=32)
    assert [problem.option for problem in found] == ["gpus-per-node", "nodes", "nodes", "time"]
    assert "3 nodes x 8 ranks = 24 ranks" in found[2].message
    assert "24 or 48" in found[2].message


def test_consistent_numbers_are_no_problem() -> None:
    job = SlurmJob("it", nodes=2, gpus_per_node=8, time=3)
    assert find_contradictions(job, devices=8, num_nodes=2, global_batch_size=32) == []
    assert find_contradictions(SlurmJob("it"), devices=None, num_nodes=None, global_batch_size=None) == []


def test_variables_are_exported_by_name() -> None:
    present = [
        "PATH",
        "WANDB_API_KEY",
        "NCCL_DEBUG",
        "AWS_SECRET",
        "CUDA_VISIBLE_DEVICES",
        "TORCHELASTIC_RUN_ID",
        "MY_DATA",
    ]
    assert select_exported_names(present, ["MY_DATA"]) == ("MY_DATA", "NCCL_DEBUG", "PATH", "WANDB_API_KEY")
