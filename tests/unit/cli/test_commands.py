"""The table of subcommands and the error boundary."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.commands import COMMANDS, Command
from launcher.cli.error_boundary import run_with_error_boundary
from launcher.cli.main import run
from launcher.core.errors import Interrupted, QueueError, TopologyError, TrainingError, UsageError

_MODULE = """
import argparse, sys

def build_parser():
    parser = argparse.ArgumentParser("launcher hello")
    parser.add_argument("--loud")
    return parser

def run(arguments):
    sys.stdout.write(f"hello {list(arguments)}\\n")
    return 7
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_parser_of_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    assert command.name == name
    assert command.load().build_parser().prog == f"launcher {name}"
    with pytest.raises(SystemExit, match=r"^0$"):
        run([name, "--help"])
    assert f"launcher {name}" in capsys.readouterr().out


def test_a_command_of_the_table_is_in_help_dispatch_hint_and_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hello_command.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(COMMANDS, "hello", Command("hello", "say hello", "hello_command"))
    with pytest.raises(SystemExit, match=r"^0$"):
        run(["--help"])
    assert "  hello       say hello\n" in capsys.readouterr().out
    assert run(["hello", "--loud", "x"]) == 7
    assert capsys.readouterr().out == "hello ['--loud', 'x']\n"
    assert run(["helo"]) == 2
    assert "did you mean hello?" in capsys.readouterr().err
    assert run(["completion", "fish"]) == 0
    assert "__fish_seen_subcommand_from hello' -l loud" in capsys.readouterr().out


def _raise(error: BaseException) -> Callable[[], int]:
    def run_command() -> int:
        raise error

    return run_command


@pytest.mark.parametrize("runs_on_ranks", [True, False])
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("wrong"), 2, "error: wrong\n"),
        (QueueError("full"), 1, "error: full\n"),
        (TrainingError("nan"), 1, "error: nan\n"),
        (
            Interrupted(15, checkpoint="last.ckpt", step=3),
            143,
            "stopped by SIGTERM (for example from a scheduler) after step 3; saved last.ckpt\n",
        ),
        (Interrupted(2, checkpoint=None, step=3), 130, "stopped by Ctrl-C after step 3; nothing was saved\n"),
        (KeyboardInterrupt(), 130, "left\n"),
    ],
)
def test_an_error_becomes_text_and_an_exit_code(
    runs_on_ranks: bool, error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command("x", "", "", runs_on_ranks=runs_on_ranks, on_interrupt="left")
    assert run_with_error_boundary(command, _raise(error), debug=False) == code
    assert capsys.readouterr().err == text


def test_any_error_after_ctrl_c_counts_as_the_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted_import() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    before = signal.getsignal(signal.SIGINT)
    for raised in (interrupted_import, _raise(KeyboardInterrupt())):
        assert run_with_error_boundary(Command("x", "", "", on_interrupt="left"), raised, debug=False) == 130
        assert capsys.readouterr().err == "left\n"
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize(
    ("error", "is_printed"), [(UsageError("x"), False), (TrainingError("x"), True), (TopologyError("x"), True)]
)
def test_a_rank_prints_only_errors_of_its_own(
    error: Exception, is_printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    run_with_error_boundary(Command("x", "", "", runs_on_ranks=True), _raise(error), debug=False)
    assert (capsys.readouterr().err != "") == is_printed
    run_with_error_boundary(Command("x", "", ""), _raise(error), debug=False)
    assert capsys.readouterr().err == "error: x\n", "other commands print every error"


def test_debug_adds_the_traceback_of_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    run_with_error_boundary(Command("x", "", ""), _raise(UsageError("wrong")), debug=True)
    assert "Traceback" in capsys.readouterr().err
    run_with_error_boundary(Command("x", "", ""), _raise(TrainingError("nan")), debug=True)
    assert "Traceback" not in capsys.readouterr().err, "it is in the rank's log"


@pytest.mark.parametrize("error", [EOFError(), BrokenPipeError(), ValueError()])
def test_an_unexpected_error_of_a_rank_is_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_with_error_boundary(Command("x", "", "", runs_on_ranks=True), _raise(error), debug=False)
