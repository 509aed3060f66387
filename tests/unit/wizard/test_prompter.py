"""Questions on a terminal that can do nothing but lines."""

from __future__ import annotations

import io

import pytest

from launcher.wizard.prompter import Choice, PlainPrompter, TerminalPrompter, make_prompter

CHOICES = [Choice(None, "nothing"), Choice(True, "yes"), Choice("name", "by name")]


def plain(answers: str) -> tuple[PlainPrompter, io.StringIO]:
    out = io.StringIO()
    return PlainPrompter(io.StringIO(answers), out), out


@pytest.mark.parametrize(
    ("typed", "default", "answer"), [("x\n", "", "x"), ("\n", "old", "old"), (" y \n", "old", "y"), ("-\n", "old", "")]
)
def test_text(typed: str, default: str, answer: str) -> None:
    prompter, out = plain(typed)
    assert prompter.text("What", default) == answer
    assert out.getvalue() == (f"What [{default}] (- for none): " if default else "What: ")


def test_a_choice_by_its_number_with_wrong_ones_told() -> None:
    prompter, out = plain("0\n4\nx\n-1\n3\n")
    assert prompter.select("Which", CHOICES) == "name"
    assert out.getvalue().startswith("Which\n  1  nothing\n  2  yes\n  3  by name\nnumber [1]: ")
    assert out.getvalue().count("expected a number from 1 to 3") == 4


@pytest.mark.parametrize("default", [None, True, "name"])
def test_enter_takes_the_default_choice(default: object) -> None:
    assert plain("\n")[0].select("Which", CHOICES, default) == default


@pytest.mark.parametrize(
    ("typed", "default", "answer"), [("\n", False, False), ("Y\n", False, True), ("no\n", True, False)]
)
def test_yes_or_no(typed: str, default: bool, answer: bool) -> None:
    assert plain(typed)[0].confirm("Sure?", default) is answer


def test_another_word_is_neither_yes_nor_no() -> None:
    prompter, out = plain("perhaps\ny\n")
    assert prompter.confirm("Sure?") is True
    assert "given 'perhaps'; expected y or n" in out.getvalue()


def test_the_end_of_the_input_is_no_answer() -> None:
    with pytest.raises(EOFError):
        plain("")[0].text("What", "default")


def test_the_terminal_decides_how_to_ask() -> None:
    assert isinstance(make_prompter({"TERM": "xterm-256color"}), TerminalPrompter)
    for env in ({"TERM": "dumb"}, {"TERM": ""}, {}):
        assert isinstance(make_prompter(env), PlainPrompter)
