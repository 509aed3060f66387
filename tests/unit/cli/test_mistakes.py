"""Mistakes of newcomers on the command line: one sentence with what was given and the command or option to use."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launcher.cli.commands import COMMANDS, CONTINUE_NAMES, OTHER_NAMES, Command
from launcher.cli.keys import check_positionals
from launcher.cli.main import run
from launcher.cli.settings import list_settings
from launcher.cli.submit import SYNONYMS as SUBMIT_SYNONYMS
from launcher.config.loading import load_config
from launcher.config.schema import RunConfig, config_fields
from launcher.config.suggestions import CommandKeys
from launcher.config.synonyms import ADVICE
from launcher.core.command_parser import CommandParser
from launcher.core.errors import CommandLineError

WITH_SETTINGS = [name for name in COMMANDS if COMMANDS[name].takes_settings and name != "init"]
_SCRIPT = """
import argparse, sys

def build_parser():
    return argparse.ArgumentParser("launcher run")

def run(arguments):
    sys.stdout.write(f"runs {list(arguments)}")
    return 0
"""
_CLASSES = """
import lightning.pytorch as pl

class Model(pl.LightningModule):
    def __init__(self, lr: float = 0.1, hidden: int = 8):
        super().__init__()

class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "newcomer_classes.py").write_text(_CLASSES)
    yield tmp_path
    sys.modules.pop("newcomer_classes", None)


@pytest.fixture
def scripts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command for plain scripts that shows its arguments."""
    (folder / "script_command.py").write_text(_SCRIPT)
    monkeypatch.setitem(COMMANDS, "run", Command("run", "run a script", "script_command"))


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    return shown.err


def parser_of(name: str) -> CommandParser:
    parser = COMMANDS[name].load().build_parser()
    assert isinstance(parser, CommandParser)
    return parser


# ---- help


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match=r"^0$"):
        run([*([name] if name else []), "--help"])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert run(["help", *([name] if name else [])]) == 0
    assert capsys.readouterr().out == shown, "`launcher help COMMAND` is the same"


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("given", [["--nproc_per_node=2", "-m", "my_pkg.train", "--help"],
                                   ["--nnodes", "1", "train.py", "-h"]])  # fmt: skip
def test_help_with_a_script_is_that_of_its_command(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(given) == 0
    assert capsys.readouterr().out == "runs ['--help']"


def test_help_for_an_unknown_command_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "help", "plam") == "error: there is no command 'plam'; did you mean plan?\n"


def test_help_of_fit_lists_every_setting_with_its_type_and_default() -> None:
    lines = dict(line.split()[0::2] for line in list_settings().splitlines()[1:])
    assert list(lines) == [f"--{path}" for path, _ in config_fields()]
    defaults = RunConfig().to_dict()
    assert lines["--trainer.max_steps"] == json.dumps(defaults["trainer"]["max_steps"]) == "-1"
    assert "  --seed int  " in list_settings()
    assert "  --wandb.mode auto|online|offline|disabled  " in list_settings()
    assert "  --trainer.deterministic true|false|warn  " in list_settings()
    assert list_settings() in parser_of("fit").format_help()
    for name in WITH_SETTINGS:
        assert "at the end of launcher fit --help" in parser_of(name).format_help()


# ---- config files, scripts and classes without an option


@pytest.mark.parametrize("name", [None, *WITH_SETTINGS])
def test_a_config_file_without_an_option_is_answered_with_the_command(
    name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*([name] if name else []), "run.yaml", "--seed", "7"]
    message = error(capsys, *given)
    assert message.startswith("error: run.yaml is given without an option; a config file needs --config:\n")
    assert message.splitlines()[-1] == f"  launcher {name or 'fit'} --config run.yaml --seed 7"


def test_several_files_and_flags_before_them_are_corrected_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("my run.yaml", "b.json"):
        (folder / name).write_text('{"seed": 3}')
    message = error(capsys, "--seed", "4", "my run.yaml", "--config", "b.json", "b.json", "--wandb.entity=x")
    command = message.splitlines()[-1].strip()
    assert command == "launcher fit --seed 4 --config 'my run.yaml' --config b.json --config b.json --wandb.entity=x"
    assert run([*shlex.split(command)[1:], "--print-config"]) == 0
    assert "seed: 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "answer", "command"),
    [
        ("train --config run.yaml", "there is no command 'train'; did you mean fit?",
         "launcher fit --config run.yaml"),
        ("trian", "there is no command 'trian'; did you mean fit?", ""),
        ("Fit", "there is no command 'Fit'; did you mean fit?", ""),
        ("train x.py --lr 3", "there is no command 'train'; did you mean run?",
         "launcher run x.py --lr 3"),
        ("torchrun -m a.b", "there is no command 'torchrun'; did you mean run?",
         "launcher run -m a.b"),
        ("resume x", "there is no command 'resume'; did you mean:",
         "launcher fit --config runs/x/config.yaml --resume auto"),
        ("resume other/x --seed 3", "there is no command 'resume'; did you mean:",
         "launcher fit --config other/x/config.yaml --resume auto --seed 3"),
        ("continue run.yaml", "there is no command 'continue'; did you mean:",
         "launcher fit --config run.yaml --resume auto"),
        ("eval --name x", "there is no command 'eval'; did you mean validate?",
         "launcher validate --name x"),
        ("inference", "there is no command 'inference'; did you mean predict?", ""),
        ("list", "there is no command 'list'; did you mean status?", ""),
        ("stop x", "there is no command 'stop'; did you mean cancel?",
         "launcher cancel x"),
        ("log x", "there is no command 'log'; did you mean logs?",
         "launcher logs x"),
        ("sbatch --time 1:00:00", "there is no command 'sbatch'; did you mean submit?",
         "launcher submit --time 1:00:00"),
        ("wizard", "there is no command 'wizard'; did you mean init?", ""),
        ("qqqq", f"there is no command 'qqqq'; commands are {', '.join(COMMANDS)}", ""),
        ("--config=run.yaml fit", "fit is a command, and a command is given first; write:",
         "launcher fit --config=run.yaml"),
        ("--name x plan", "plan is a command, and a command is given first; write:",
         "launcher plan --name x"),
        ("-c a.yaml test --name x", "test is a command, and a command is given first; write:",
         "launcher test -c a.yaml --name x"),
        ("--nproc-per-node 2 run x.py", "run is a command, and a command is given first; write:",
         "launcher run --nproc-per-node 2 x.py"),
        ("run.yaml fit --seed 3", "run.yaml is given without an option; a config file needs --config:",
         "launcher fit --config run.yaml --seed 3"),
        ("test x", "x is given without an option; a run needs --name:",
         "launcher test --name x"),
        ("predict x --devices 1", "x is given without an option; a run needs --name:",
         "launcher predict --name x --devices 1"),
    ],
)  # fmt: skip
def test_a_command_that_is_called_otherwise_or_not_first_is_named(
    given: str, answer: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error(capsys, *given.split()) == "\n  ".join(filter(None, (f"error: {answer}", command))) + "\n"


def test_every_other_name_of_a_command_stands_for_one() -> None:
    assert set(OTHER_NAMES.values()) <= set(COMMANDS)
    assert not {*OTHER_NAMES, *CONTINUE_NAMES} & set(COMMANDS)


@pytest.mark.parametrize("name", ["test", "predict"])
def test_an_evaluation_of_nothing_asks_for_a_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, name)
    assert f"the built-in demo has none for {name}; give a run of your own model" in message
    assert f"launcher {name} --name NAME" in message


def test_a_secret_is_not_shown_in_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "hunter2" not in error(capsys, "run.yaml", "--model.init_args.api_key", "hunter2")


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("given", [["train.py", "--lr", "3"], ["-m", "my_pkg.train", "--lr", "3"]])
def test_a_script_is_run_as_one(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(given) == 0
    assert capsys.readouterr().out == f"runs {given}"


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("name", [[], ["fit"], ["test"]])
@pytest.mark.parametrize("given", [["--nproc-per-node", "2", "train.py", "--lr", "3"],
                                   ["--nnodes", "1", "-m", "my_pkg.train", "-x"]])  # fmt: skip
def test_a_script_after_options_is_answered_with_the_command(
    name: list[str], given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = error(capsys, *name, *given)
    assert message.splitlines()[-1] == f"  launcher run {shlex.join(given)}"


@pytest.mark.usefixtures("scripts")
def test_a_script_with_a_config_is_answered_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--config", "run.yaml", "--config=run.yaml", "-c", "x.yaml", "train.py", "--lr", "3"]
    assert error(capsys, *given).splitlines()[-1] == "  launcher run train.py --lr 3"


def test_an_argument_of_the_configs_optimizer_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    optimizers = ["--optimizer", "AdamW", "--lr_scheduler", "StepLR"]
    given = ["--model", "tests.support.toy.Toy", *optimizers]
    both = "did you mean --model.init_args.lr 3 or --optimizer.init_args.lr 3?"
    assert both in error(capsys, *given, "--lr", "3")
    assert "--lr_scheduler.init_args.step_size 3" in error(capsys, *given, "--step_sizes", "3")
    assert "init_args.params" not in error(capsys, *given, "--params", "3")


def test_a_script_is_submitted_with_its_option() -> None:
    arguments = ["--nodes", "2", "train.py", "--lr", "3"]
    with pytest.raises(CommandLineError) as caught:
        check_positionals("submit", arguments, arguments[2:], CommandKeys(("--script",)))
    assert str(caught.value).splitlines()[-1] == "  launcher submit --nodes 2 --script train.py -- --lr 3"


def test_a_model_without_an_option_is_answered_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "plan", "my_pkg.deep.MyModel", "--seed", "1")
    assert message.splitlines()[-1] == "  launcher plan --model my_pkg.deep.MyModel --seed 1"


# ---- options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_without_its_value_is_reported(name: str) -> None:
    parser = parser_of(name)
    for action in parser._actions:
        if action.nargs == 0 or not action.option_strings or action.nargs in ("?", "*"):
            continue
        for option in action.option_strings:
            for given in ([option], [option, "--debug"]):
                with pytest.raises(CommandLineError) as caught:
                    parser.parse_known_args(given)
                shown, _, advice = str(caught.value).partition(" is given without a value; write ")
                assert shown in action.option_strings
                assert advice.startswith(f"{shown} ")


# A script may have any options.
@pytest.mark.parametrize("name", [name for name in COMMANDS if not COMMANDS[name].takes_settings and name != "run"])
def test_a_misspelt_option_is_reported_with_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = parser_of(name).list_options()[-1]
    positionals = [action.dest for action in parser_of(name)._actions if not action.option_strings]
    given = ["bash" if each == "shell" else "x" for each in positionals]
    message = error(capsys, name, *given, f"{option}s")
    assert f"`launcher {name}` has no option {option}s; did you mean {option}?" in message


def test_a_missing_or_invalid_argument_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert error(capsys, "logs").endswith("required: RUN; `launcher logs --help` lists the options\n")
    assert "--rank: invalid int value: 'x'; " in error(capsys, "logs", "first", "--rank", "x")
    assert "has no argument second; " in error(capsys, "logs", "first", "second")


def _option_synonyms(table: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, option) for name, option in table.items() if option.startswith("--")]


@pytest.mark.parametrize(
    ("command", "name", "option"),
    [
        *(("fit", *each) for each in _option_synonyms(ADVICE["fit"])),
        *(("plan", *each) for each in _option_synonyms(ADVICE["plan"])),
        *(("submit", *each) for each in _option_synonyms(SUBMIT_SYNONYMS)),
    ],
)
def test_each_name_of_another_tool_suggests_an_option_that_is_accepted(
    command: str, name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = f"-{name}" if len(name) == 1 or name == "np" else f"--{name}"
    assert f"did you mean {option} 3?" in error(capsys, command, typed, "3")
    options, rest = parser_of(command).parse_known_args([option, "3"])
    assert isinstance(options, argparse.Namespace)
    assert load_config([], rest), "an option of the command, or a setting"


def test_submit_names_each_wrong_option_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "submit", "--nproc-per-node", "4", "-n", "8", "--gres=gpu:4", "--output", "x.log")
    assert message.splitlines() == [
        "error: the config has 4 problems:",
        "  -n: unknown option; one task on each node starts its ranks; give --nodes N and --devices N",
        "  nproc_per_node: unknown key; did you mean --devices 4?",
        "  gres: unknown key; give the number of GPUs with --gpus-per-node N",
        (
            "  output: unknown key; each rank has a log in the run directory; remove it, and read one with "
            "`launcher logs RUN`"
        ),
    ]


# ---- everything at once


@pytest.mark.parametrize("arguments", [["submit", "--dry-run"], ["submit", "--sweep", "seed=1,2"], ["plan"], ["fit"]])
def test_a_class_that_is_surely_missing_stops_a_command_before_ranks_start(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", "newcomer_classes.Modle", "--data", "newcomer_classes.Data", "--data.batch_sise", "3"]
    assert [line.split(": ")[0].strip() for line in error(capsys, *arguments, *given).splitlines()] == [
        "error", "model.class_path", "data.init_args.batch_sise",
    ]  # fmt: skip
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_wrong_keys_values_classes_and_arguments_are_reported_at_once(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text(
        "model: {class_path: newcomer_classes.Modle}\n"
        "data: {class_path: newcomer_classes.Data, init_args: {batch_sise: 3}}\n"
        "trainer: {max_epochs: many, callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStoping}]}\n"
    )
    message = error(capsys, name, "--config", "bad.yaml", "--batch_size", "3", "--lr", "0.1", "--epochs", "--name")
    lines = message.splitlines()
    assert lines[0] == "error: the config has 8 problems:"
    expected = {
        "name": "given without a value; write --name VALUE",
        "trainer.max_epochs": "given 'many'; expected a whole number or null",
        "batch_size": "unknown key; did you mean --data.init_args.batch_size 3?",
        "lr": "unknown key; no class takes it; they take data.init_args.batch_size",
        "epochs": "unknown key; did you mean --trainer.max_epochs?",
        "model.class_path": "module newcomer_classes has no Modle; ",
        "data.init_args.batch_sise": "Data takes no batch_sise; did you mean batch_size?",
        "trainer.callbacks[0].class_path": "module lightning.pytorch.callbacks has no EarlyStoping; ",
    }
    found = dict(line.strip().split(": ", 1) for line in lines[1:])
    assert list(found) == list(expected)
    assert all(found[path].startswith(text) for path, text in expected.items())
    assert found["model.class_path"].endswith("did you mean Model?")
    assert not (folder / "runs").exists()
