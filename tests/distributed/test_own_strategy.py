"""A package that is installed beside the launcher adds a strategy by one entry point, and everything knows it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import launcher, run
from tests.support.runs import REPOSITORY, TOY, events_of, read_trace, toy_env

pytestmark = pytest.mark.slow
ON_TWO = ("--strategy", "my_ddp", "--devices", "2", "--accelerator", "cpu", "--name", "it")
_MODULE = """
from strategies.ddp import Distributed

class MyDdp(Distributed):
    name = "my_ddp"
    summary = "DDP that reports when it is built"
    order = 12

    def build(self, choice, options):
        print(f"my_ddp on rank {options.location.rank}", flush=True)
        return super().build(choice, options)
"""
_WIZARD = """
from rich.console import Console
from launcher import SetupWizard, WizardConfig
from tests.support.scripted_prompter import ScriptedPrompter

prompter = ScriptedPrompter(Strategy="my_ddp", Ranks="2")
config = SetupWizard(prompter, console=Console()).run(WizardConfig(accelerator="cpu"))
print("CHOSEN", config.strategy, [title for title in prompter.titles["Strategy"] if "my_ddp" in title])
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have the package."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "my_strategies.py").write_text(_MODULE)
    information = folder / "my_strategies-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-strategies\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[launcher.strategies]\nmy_ddp = my_strategies:MyDdp\n")
    return {**toy_env(folder / "trace"), "PYTHONPATH": f"{REPOSITORY}:{folder}"}


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_help_lists_it(tmp_path: Path, env: dict[str, str], command: str) -> None:
    output = run(launcher(command, "--help"), tmp_path, env=env).check().output
    assert re.search(r"^  my_ddp +DDP that reports when it is built$", output, re.MULTILINE)


def test_a_plan_compares_it_and_uses_it_on_request(tmp_path: Path, env: dict[str, str]) -> None:
    output = run(launcher("plan", *TOY, *ON_TWO, "--json"), tmp_path, env=env).check().output
    plan = json.loads(output)
    assert plan["strategy"]["name"] == "my_ddp"
    assert "my_ddp" in [assessed["name"] for assessed in plan["memory"]["assessments"]]


def test_the_wizard_offers_it(tmp_path: Path, env: dict[str, str]) -> None:
    output = run([sys.executable, "-c", _WIZARD], tmp_path, env=env).check().output
    assert "CHOSEN my_ddp ['my_ddp: DDP that reports when it is built']" in output


def test_a_run_trains_with_it_and_is_resumed_with_it(tmp_path: Path, env: dict[str, str]) -> None:
    settings = (*TOY, *ON_TWO, "--global_batch_size", "8")
    for epochs, resume in ((1, "none"), (2, "auto")):
        arguments = (*settings, "--trainer.max_epochs", str(epochs), "--resume", resume)
        output = run(launcher("fit", *arguments), tmp_path, env=env).check().output
        assert "my_ddp on rank 0" in output
    directory = tmp_path / "runs" / "it"
    assert "my_ddp on rank 1" in (directory / "logs" / "rank-1.log").read_text()
    assert json.loads((directory / "plan.json").read_text())["strategy"]["name"] == "my_ddp"
    steps = [event["step"] for event in events_of(directory, "finished")]
    assert steps[1] == 2 * steps[0]
    assert sorted({step for step, *_ in read_trace(Path(env["TRACE"]))}) == list(range(steps[1]))


def test_an_unknown_strategy_is_refused_with_it_among_the_valid_ones(tmp_path: Path, env: dict[str, str]) -> None:
    output = run(launcher("plan", *TOY, "--strategy", "your_ddp"), tmp_path, env=env).check(2).output
    assert "given 'your_ddp'; expected one of auto, single_device, ddp, " in output
    assert "my_ddp" in output.partition("expected one of")[2]
