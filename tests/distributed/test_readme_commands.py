"""Every command line of the README: run as a new user would, or listed with the reason why it is not run."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from launcher.cli import main as cli
from tests.distributed.test_readme_code import THEIRS
from tests.support.processes import launcher, run
from tests.support.runs import REPOSITORY, toy_env

pytestmark = pytest.mark.slow

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# Start of a command line, and why the test below does not run it.
ELSEWHERE = {
    "python3 -m venv": ".ci/run makes the environment",
    'pip install -e ".[test]"': ".ci/run does it",
    "pip install -e . &&": "the second command's install is .ci/run's; tests/distributed/test_demo.py is its training",
    "torchrun --nproc-per-node 8": "8 ranks; test_agreement_run.py has two of torchrun's",
    "python -m launcher fit --nproc-per-node 8": "8 ranks; test_coordinator_run.py and others have two",
    "python -m launcher fit --nnodes": "two machines; test_nodes.py has two agents on one",
    "python -m launcher submit": "queued for real by tests/slurm; its dry run is below",
    "python -m launcher status lr": "of the sweep that was submitted: test_local_sweep.py and tests/slurm have one",
    "python -m launcher cancel": "tests/distributed/test_local_submit.py cancels a run that trains",
}


def commands() -> list[str]:
    found = re.findall(r"^    ((?:python3?|pip|torchrun|launcher) .*?)(?: +# .*)?$", README, re.M)
    assert len(found) > 15
    return found


def test_commands_of_the_readme_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the README's order, with its `run.yaml`; the toy model replaces the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    for name, value in {**toy_env(tmp_path / "trace"), "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "my_pkg.py").write_text(THEIRS)
    text = README.partition("    # run.yaml\n")[2].partition("\n\n")[0]
    (tmp_path / "run.yaml").write_text(textwrap.dedent(text) + "\nwandb: {mode: disabled}\n")
    done: set[str] = set()
    names = ["my-run", "another-run"]
    for command in commands():
        if command in done or any(command.startswith(start) for start in ELSEWHERE):
            continue
        done.add(command)
        arguments = shlex.split(command)[3:]
        if arguments[0] == "fit":
            # The toy has 64 samples and trains in one process.
            small = ("--trainer.max_steps", "2", "--global_batch_size", "8")
            own = () if "--name" in arguments else ("--name", names.pop(0))
            run(launcher(*arguments, *own, *small), tmp_path).check()
            continue
        if "--open" in arguments:
            arguments.remove("--open")  # there is no browser
        if arguments[0] == "logs":
            # A finished run of one rank.
            arguments = [word if word != "3" else "0" for word in arguments]
        assert cli.run(arguments) == 0, f"{command}\n{capsys.readouterr()}"
    # Quoted in the text.
    for quoted in ("init --yes --preset debug --output debug.yaml", "plan --config run.yaml", "report my-run --json",
                   "submit --config run.yaml --nodes 2 --gpus-per-node 8 --partition gpu --dry-run",
                   "completion bash", "fit --print-config"):  # fmt: skip
        assert cli.run(quoted.split()) == 0, quoted
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert (tmp_path / "runs" / "scale" / "report.html").is_file()


def test_commands_that_are_not_run_are_still_in_the_readme() -> None:
    lines = commands()
    gone = [start for start in ELSEWHERE if not any(line.startswith(start) for line in lines)]
    assert gone == [], "the README has changed: remove these reasons"
