"""Messages that `TrainingCoordinator` shows name its arguments, not options of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.config.synonyms import ADVICE
from launcher.core.errors import CallError, ConfigError, Problem, RunDirectoryError, TrainingError
from launcher.core.python_terms import to_python_error, to_python_terms

REPOSITORY = Path(__file__).resolve().parents[3]
# Packages that a training of `TrainingCoordinator` uses.
PACKAGES = ("agreement", "checkpoint", "config", "hardware", "loggers", "monitoring", "planning", "process", "runs",
            "training", "user_code")  # fmt: skip
# Files that only commands use: they read options, and print plans and evaluations. The advice about settings is for
# all, and is added to the messages.
OF_COMMANDS = (
    "config/config_file.py",
    "config/launch_options.py",
    "config/loading.py",
    "config/synonyms.py",
    "hardware/target_machines.py",
    "planning/plot.py",
    "runs/continuation.py",
    "training/evaluated_run.py",
)
# Programs whose options a message may name.
PROGRAMS = ("srun", "mpirun", "torchrun", "--map-by", "python -m launcher fit", "`launcher fit --devices")
# Texts that are not messages: options that are read or passed on.
NO_MESSAGES = (
    "--config-name",
    "--config-path",
    "--config-dir",
    "given --nproc-per-node",
    "--it",
    "# python",
    "not an option; give settings",
)


def messages() -> Iterator[tuple[str, str]]:
    """Each text of more than a word with an option in it, and its place."""
    for package in PACKAGES:
        for file in sorted((REPOSITORY / "launcher" / package).rglob("*.py")):
            name = str(file.relative_to(REPOSITORY / "launcher"))
            if name in OF_COMMANDS:
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            skipped: set[ast.AST] = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    skipped.update(node.values)
                elif isinstance(node, ast.Expr):
                    skipped.add(node.value)  # a docstring
            for node in ast.walk(tree):
                if node in skipped or not isinstance(node, ast.Constant | ast.JoinedStr):
                    continue
                text = _text_of(node)
                if re.search(r"(?<![\w-])--[a-z]", text) and not text.startswith(NO_MESSAGES):
                    yield f"{name}:{node.lineno}", text


def _text_of(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)


MESSAGES = {**dict(messages()), **ADVICE["settings"]}


@pytest.mark.parametrize("place", MESSAGES)
def test_no_message_names_an_option_to_users_of_python(place: str) -> None:
    text = MESSAGES[place]
    if any(program in text for program in PROGRAMS):
        return
    assert "--" not in to_python_terms(text)


def test_there_are_messages_with_options() -> None:
    assert len(MESSAGES) > 8


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("choose another --name, or resume it with --resume auto",
         'choose another name with train(name=...), or resume it with train(resume_from_checkpoint="auto")'),
        ("--resume PATH, --resume none",
         "train(resume_from_checkpoint=PATH), train(resume_from_checkpoint=None)"),
        ("it needs --resume-trust", "it needs TrainingCoordinator(resume_trust=True)"),
        ("raise trainer.max_epochs or trainer.max_steps", "raise max_epochs or max_steps"),
        ("choose another runs_dir, not /a/runs_dir", "choose another output_dir, not /a/runs_dir"),
        ("use srun --ntasks-per-node=2", "use srun --ntasks-per-node=2"),
        ("self.trainer.max_epochs", "self.trainer.max_epochs"),
    ],
)  # fmt: skip
def test_options_become_arguments(option: str, argument: str) -> None:
    assert to_python_terms(option) == argument


def test_errors_of_the_launcher_are_translated_and_those_of_the_users_code_are_not() -> None:
    found = to_python_error(ConfigError([Problem("trainer.max_epoch", "did you mean trainer.max_epochs?")]))
    assert isinstance(found, CallError)
    assert found.problems == (Problem("max_epoch", "did you mean max_epochs?"),)
    assert to_python_error(ConfigError([Problem("runs_dir", "x")])).problems == (Problem("output_dir", "x"),)  # type: ignore[attr-defined]
    assert str(to_python_error(RunDirectoryError("another --name"))) == "another name with train(name=...)"
    assert str(to_python_error(TrainingError("my --name"))) == "my --name"
