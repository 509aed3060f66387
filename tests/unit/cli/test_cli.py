"""The command line in real processes: exit codes, messages, and no heavy import for help."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from launcher import __version__
from launcher.cli import main as cli
from tests.support.processes import Finished, launcher, run, run_warm

REPOSITORY = Path(__file__).resolve().parents[3]
TOY = ("--model", "tests.support.toy.Toy", "--data", "tests.support.toy.ToyData")
_HEAVY = re.compile(
    r"^import time:.*\|\s+(torch|lightning|deepspeed|wandb|pytorch_lightning|matplotlib)$", re.MULTILINE
)


def launch(*given: str, cwd: Path, timeout: float = 60) -> Finished:
    return run(launcher(*given), cwd, timeout=timeout)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--help"], "commands:"),
        (["-h"], "exit codes:"),
        (["fit", "--help"], "--print-config"),
        (["plan", "--help"], "--json"),
        (["init", "--help"], "--preset NAME"),
        (["doctor", "--help"], "--json"),
        (["report", "--help"], "--output"),
        (["--version"], f"launcher {__version__}"),
    ],
)
def test_help_and_version_succeed_without_a_heavy_import(tmp_path: Path, given: list[str], text: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launcher", *given]
    ended = run(command, tmp_path, timeout=30).check()
    assert text in ended.output
    assert "launcher.cli.main" in ended.output, "the import times are there"
    assert _HEAVY.findall(ended.output) == []


@pytest.mark.parametrize(
    "code",
    [
        "import launcher",
        "from launcher import RunConfig, load_config; load_config()",
        "from launcher import WizardConfig; WizardConfig().with_preset('debug').validate()",
    ],
)
def test_importing_the_package_and_reading_a_config_import_nothing_heavy(tmp_path: Path, code: str) -> None:
    ended = run([sys.executable, "-X", "importtime", "-c", code], tmp_path, timeout=30).check()
    assert _HEAVY.findall(ended.output) == []


def test_a_heavy_import_is_detected(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    ended = run([sys.executable, "-X", "importtime", "-c", "import torch"], tmp_path, timeout=30).check()
    assert _HEAVY.findall(ended.output) == ["torch"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("plam", "did you mean plan?"),
        ("fitt", "did you mean fit?"),
        ("docter", "did you mean doctor?"),
        (
            "zzz",
            (
                "commands are fit, plan, validate, test, predict, run, submit, status, logs, cancel, init, convert, "
                "doctor, report, help, completion"
            ),
        ),
        ("reprot", "did you mean report?"),
    ],
)
def test_an_unknown_command_is_a_usage_error_with_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    ended = launch(name, cwd=tmp_path).check(2)
    assert ended.output == f"error: there is no command '{name}'; {hint}\n"


@pytest.mark.parametrize("command", [["plan"], []])
def test_a_config_error_lists_every_problem_without_a_traceback(tmp_path: Path, command: list[str]) -> None:
    ended = launch(*command, "--seed", "many", "--trainer.max_epoch=3", "--config", "none.yaml", cwd=tmp_path).check(2)
    assert "error: the config has 3 problems:\n" in ended.output
    assert "  none.yaml: no such file" in ended.output
    assert "  seed: given 'many'" in ended.output
    assert "  trainer.max_epoch: unknown key; did you mean --trainer.max_epochs 3?" in ended.output
    assert "Traceback" not in ended.output
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_debug_shows_the_traceback_of_a_config_error_too(tmp_path: Path) -> None:
    ended = launch("fit", "--debug", "--seed", "many", cwd=tmp_path).check(2)
    assert "Traceback (most recent call last)" in ended.output
    assert "error: the config has 1 problem:\n" in ended.output


def test_incomplete_rank_variables_are_a_usage_error(tmp_path: Path) -> None:
    ended = run(launcher("plan"), tmp_path, env={"RANK": "0"}, timeout=30).check(2)
    assert "WORLD_SIZE" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("command", [["plan"], []])
def test_a_printed_config_is_accepted_again_and_prints_the_same(tmp_path: Path, command: list[str]) -> None:
    given = [*command, "--model", "pkg.X", "--model.lr", "1e-4", "--name", "7", "--wandb.tags", "[a]"]
    printed = launch(*given, "--print-config", cwd=tmp_path).check().output
    assert yaml.safe_load(printed)["model"] == {"class_path": "pkg.X", "init_args": {"lr": 1e-4}}
    (tmp_path / "c.yaml").write_text(printed)
    assert launch(*command, "--config", "c.yaml", "--print_config", cwd=tmp_path).check().output == printed


def test_a_later_config_file_and_the_command_line_override(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nname: a\nruns_dir: a\n")
    (tmp_path / "b.yaml").write_text("seed: 2\nname: b\n")
    ended = launch("-c", "a.yaml", "--seed", "3", "-c", "b.yaml", "--print-config", cwd=tmp_path).check()
    values = yaml.safe_load(ended.output)
    assert (values["seed"], values["name"], values["runs_dir"]) == (3, "b", "a")


def plan(*given: str) -> Finished:
    return run_warm(launcher("plan", *given), REPOSITORY, timeout=60)


@pytest.mark.slow
def test_plan_prints_a_table_and_starts_nothing(tmp_path: Path) -> None:
    ended = plan(*TOY, "--global-batch-size", "8", "--runs_dir", str(tmp_path)).check()
    assert "single_device" in ended.output
    assert "global_batch_size 8" in ended.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plan_as_json_is_the_plan_for_the_users_own_classes(tmp_path: Path) -> None:
    options = ("--accelerator", "cpu", "--devices", "2", "--data.batch_size", "3", "--runs_dir", str(tmp_path))
    ended = plan("--json", *TOY, *options, "--global-batch-size", "8").check()
    planned = json.loads(ended.output)
    assert planned["strategy"]["name"] == "ddp"
    assert planned["world_size"] == 2
    assert planned["batch"] == {"world_size": 2, "micro_batch_size": 2, "accumulate": 2, "global_batch_size": 8}
    assert planned["assumed"] is True
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_class_of_the_wrong_type_is_a_usage_error(tmp_path: Path) -> None:
    given = ("--model", "tests.support.toy.NoModule", "--runs_dir", str(tmp_path))
    ended = plan(*given).check(2)
    assert "model.class_path: tests.support.toy.NoModule is not a LightningModule" in ended.output
    assert "Traceback" not in ended.output


def test_torchrun_never_reads_a_part_of_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with a traceback if a rank is ended while it writes the file."""
    file = tmp_path / "error.json"
    file.touch()
    before = file.stat().st_ino
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert cli.run(["fit", "--model", "nowhere.Model", "--devices", "1"]) == 2
    assert "nowhere.Model does not import" in json.loads(file.read_text())["message"]["message"]
    assert file.stat().st_ino != before, "replaced, not written in place"
    assert (os.environ["TORCHELASTIC_ERROR_FILE"], list(tmp_path.iterdir())) == (str(file), [file])
