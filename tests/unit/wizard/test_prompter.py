"""Questions on a terminal that cannot move its cursor."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest
from rich.console import Console

from launcher.wizard.prompter import Choice, PlainPrompter, TerminalPrompter, hide_early_input, make_prompter

CHOICES = [Choice(None, "nothing"), Choice(True, "yes"), Choice("name", "by name")]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[PlainPrompter, io.StringIO]]:
    """A prompter with these lines on standard input, and its output."""

    def make(answers: str) -> tuple[PlainPrompter, io.StringIO]:
        out = io.StringIO()
        monkeypatch.setattr("sys.stdin", io.StringIO(answers))
        return PlainPrompter(Console(file=out, width=100)), out

    return make


Ask = Callable[[str], tuple[PlainPrompter, io.StringIO]]


@pytest.mark.parametrize(
    ("typed", "default", "answer"), [("x\n", "", "x"), ("\n", "old", "old"), (" y \n", "old", "y"), ("-\n", "old", "")]
)
def test_text(ask: Ask, typed: str, default: str, answer: str) -> None:
    prompter, out = ask(typed)
    assert prompter.text("What [a]", default) == answer
    assert out.getvalue() == (f"What [a] (- for none) ({default}): " if default else "What [a]: ")


def test_a_choice_is_made_by_number_and_other_input_is_rejected(ask: Ask) -> None:
    prompter, out = ask("0\n4\nx\n-1\n3\n")
    assert prompter.select("Which", CHOICES) == "name"
    assert out.getvalue().startswith("Which\n  1  nothing\n  2  yes\n  3  by name\nnumber, 1 to 3 (1): ")
    assert out.getvalue().count("Please select one of the available options") == 4


@pytest.mark.parametrize("default", [None, True, "name"])
def test_enter_selects_the_default_choice(ask: Ask, default: object) -> None:
    assert ask("\n")[0].select("Which", CHOICES, default) == default


@pytest.mark.parametrize(
    ("typed", "default", "answer"), [("\n", False, False), ("Y\n", False, True), ("n\n", True, False)]
)
def test_yes_or_no(ask: Ask, typed: str, default: bool, answer: bool) -> None:
    assert ask(typed)[0].confirm("Sure?", default) is answer


def test_other_text_is_neither_yes_nor_no(ask: Ask) -> None:
    prompter, out = ask("perhaps\ny\n")
    assert prompter.confirm("Sure?") is True
    assert "Please enter Y or N" in out.getvalue()


def test_the_end_of_the_input_is_not_an_answer(ask: Ask) -> None:
    for question in ("text", "select", "confirm"):
        prompter, _ = ask("")
        with pytest.raises(EOFError):
            getattr(prompter, question)("What", *([CHOICES] if question == "select" else []))


def test_the_kind_of_terminal_selects_the_prompter() -> None:
    assert isinstance(make_prompter({"TERM": "xterm-256color"}), TerminalPrompter)
    for env in ({"TERM": "dumb"}, {"TERM": ""}, {}):
        assert isinstance(make_prompter(env), PlainPrompter)


def test_what_is_typed_between_two_questions_is_not_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)

        def is_echoed() -> bool:
            return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)

        with hide_early_input(TerminalPrompter()):
            assert not is_echoed()
        assert is_echoed()
        with hide_early_input(make_prompter({"TERM": "dumb"})):
            assert is_echoed(), "a plain terminal has to show the answer"
    os.close(master)


def test_the_first_question_does_not_wait_for_lightning() -> None:
    code = """
import sys
from launcher.wizard.wizard import SetupWizard
class FirstQuestion:
    def text(self, message, default=""):
        sys.exit(", ".join({"lightning", "deepspeed", "wandb"} & sys.modules.keys()) or message)
SetupWizard(FirstQuestion()).run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip().startswith("Model: the LightningModule"), done.stderr
