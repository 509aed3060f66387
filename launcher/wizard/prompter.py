"""Asking a person: on a terminal with arrow keys, or line by line where the terminal cannot do that."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

# Terminals that cannot move the cursor: an editor's shell, a serial line, a screen reader's.
_PLAIN_TERMINALS = ("", "dumb", "unknown")


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of a list to choose from.

    Attributes:
        value: what is answered.
        title: what is shown.
    """

    value: Any
    title: str


class Prompter(Protocol):
    """Asks one question at a time; Ctrl-C raises KeyboardInterrupt, the end of the input EOFError."""

    def text(self, message: str, default: str = "") -> str:
        """A line of text."""
        ...

    def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
        """The value of one of `choices`."""
        ...

    def confirm(self, message: str, default: bool = True) -> bool:
        """Yes or no."""
        ...


class TerminalPrompter:
    """Arrow keys and an editable line, through questionary."""

    def text(self, message: str, default: str = "") -> str:
        """A line of text, `default` to begin with."""
        import questionary

        return questionary.text(message, default=default).unsafe_ask()

    def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
        """The value of one of `choices`, the one of `default` marked."""
        import questionary

        # By position: questionary takes a choice whose value is None to have none, and answers its title.
        lines = [questionary.Choice(choice.title, value=number) for number, choice in enumerate(choices)]
        start = next((n for n, choice in enumerate(choices) if choice.value == default), 0)
        answer = questionary.select(message, choices=lines, default=lines[start], instruction=" ").unsafe_ask()
        return choices[answer].value

    def confirm(self, message: str, default: bool = True) -> bool:
        """Yes or no, `default` on Enter."""
        import questionary

        return questionary.confirm(message, default=default).unsafe_ask()


class PlainPrompter:
    """Numbered lists and whole lines: works on any terminal.

    Args:
        lines: where answers come from, a line each.
        out: where questions go.
    """

    def __init__(self, lines: TextIO, out: TextIO) -> None:
        self._lines = lines
        self._out = out

    def text(self, message: str, default: str = "") -> str:
        """A line of text; an empty one is `default`, a lone '-' is no text."""
        hint = f" [{default}] (- for none)" if default else ""
        answer = self._ask(f"{message}{hint}: ")
        return "" if answer == "-" else answer or default

    def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
        """The value of the choice whose number is given."""
        start = next((n for n, choice in enumerate(choices) if choice.value == default), 0)
        self._out.write(f"{message}\n")
        for number, choice in enumerate(choices, 1):
            self._out.write(f"  {number}  {choice.title}\n")
        while True:
            answer = self._ask(f"number [{start + 1}]: ")
            number = int(answer) if answer.isdecimal() else (start + 1 if not answer else 0)
            if 1 <= number <= len(choices):
                return choices[number - 1].value
            self._out.write(f"given {answer!r}; expected a number from 1 to {len(choices)}\n")

    def confirm(self, message: str, default: bool = True) -> bool:
        """Yes or no."""
        while True:
            answer = self._ask(f"{message} [{'Y/n' if default else 'y/N'}]: ").lower()
            if answer in ("", "y", "yes", "n", "no"):
                return default if not answer else answer.startswith("y")
            self._out.write(f"given {answer!r}; expected y or n\n")

    def _ask(self, prompt: str) -> str:
        self._out.write(prompt)
        self._out.flush()
        line = self._lines.readline()
        if not line:
            raise EOFError("the input ended before the last question")
        return line.strip()


def make_prompter(env: Mapping[str, str]) -> Prompter:
    """The prompter that this terminal can show.

    Args:
        env: the environment; TERM says what the terminal can do.
    """
    if env.get("TERM", "") in _PLAIN_TERMINALS:
        return PlainPrompter(sys.stdin, sys.stdout)
    return TerminalPrompter()
