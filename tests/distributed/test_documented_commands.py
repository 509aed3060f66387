"""The commands of README and docs: run as a new user would, or listed with the reason why they are not run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.cli import main as cli
from tests.support.documentation import arguments_of, commands, write_user_files
from tests.support.processes import launcher, run_warm
from tests.support.runs import REPOSITORY, toy_env

pytestmark = pytest.mark.slow

# Start of a command line, and why the test below does not run it.
ELSEWHERE = {
    "python3 -m venv": ".ci/run creates the environment",
    'pip install -e ".[test]"': ".ci/run does it",
    'pip install -e ".[docs]"': ".ci/run builds the site",
    "pip install -e . &&": ".ci/run installs; tests/distributed/test_demo.py trains the demo on two ranks",
    "torchrun --nproc-per-node 8": "8 ranks; test_agreement_run.py has two of torchrun's",
    "python -m launcher fit --nproc-per-node": "several ranks; test_coordinator_run.py and test_hangs.py have two",
    "python -m launcher fit --nnodes": "several machines; test_nodes.py has two agents on one",
    "python -m launcher run": "several ranks; test_plain_scripts.py has two",
    "python -m launcher submit": "queued for real by tests/slurm and test_local_submit.py; dry runs are below",
    "python -m launcher status lr": "a sweep's; test_local_sweep.py and tests/slurm have one",
    "python -m launcher report my-sweep": "a sweep's; test_report_sweep.py has one",
    "python -m launcher cancel": "test_local_submit.py cancels a run that trains",
    "python -m launcher doctor --nodes": "needs a cluster; tests/slurm has one",
    "python -m launcher doctor --nproc-per-node": "test_preflight.py measures two ranks",
    "python -m launcher test --config run.yaml --checkpoint other.ckpt": "test_evaluate_run.py has such a checkpoint",
}


def test_commands_of_the_pages_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the pages, with their own `run.yaml`; a training of the toy replaces the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    for name, value in {**toy_env(tmp_path / "trace"), "WANDB_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    write_user_files(tmp_path)
    done: set[str] = set()
    for page, command in commands():
        if command in done or any(command.startswith(start) for start in ELSEWHERE):
            continue
        done.add(command)
        arguments = list(arguments_of(command) or ())
        if not arguments or arguments[0] == "fit":
            # The toy has 64 samples; two steps of the demo are enough.
            small = ["--trainer.max_steps", "2", "--global_batch_size", "8", "--trainer.limit_val_batches", "1"]
            run_warm(launcher(*(arguments or ["fit"]), *small), tmp_path).check()
            continue
        if arguments[0] in ("validate", "test", "predict"):
            run_warm(launcher(*arguments), tmp_path).check()
            continue
        if arguments[0] == "report":
            runs = {"another-run": "scale", "a-third-run": "scale"}
            arguments = list(dict.fromkeys(runs.get(argument, argument) for argument in arguments))
        if arguments[0] == "logs":
            # A finished run of one rank.
            arguments = [word if word not in ("3", "1") else "0" for word in arguments]
        # `doctor` may report a problem of this machine.
        assert cli.run(arguments) in ((0, 1) if arguments == ["doctor"] else (0,)), (
            f"{page}: {command}\n{capsys.readouterr()}"
        )
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert (tmp_path / "weights.pt").is_file()
    assert (tmp_path / "runs" / "scale" / "report.html").is_file()
    assert (tmp_path / "runs" / "my-run" / "predictions" / "rank-0.pt").is_file()


@pytest.mark.parametrize("command", dict.fromkeys(
    command for _, command in commands() if command.startswith("python -m launcher submit")
))  # fmt: skip
def test_every_submission_passes_its_dry_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    write_user_files(tmp_path)
    submit, *given = shlex.split(command)[3:]
    arguments = [submit, *([] if "--dry-run" in command else ["--dry-run"]), *given]
    assert cli.run(arguments) == 0, capsys.readouterr()


def test_commands_that_are_not_run_are_still_in_the_pages() -> None:
    lines = [command for _, command in commands()]
    assert [start for start in ELSEWHERE if not any(line.startswith(start) for line in lines)] == []
