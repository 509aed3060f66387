"""Asks the user: with arrow keys, or line by line on a terminal that cannot move its cursor."""

from __future__ import annotations

import contextlib
import shutil
import sys
import termios
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.prompt import Confirm, Prompt
from rich.text import Text

from launcher.core.terminal import make_console

# Terminals that cannot move the cursor: the shell of an editor, a serial line, a screen reader.
_PLAIN_TERMINALS = ("", "dumb", "unknown")


@dataclass(frozen=True, slots=True)
class Choice:
    """An entry of a list: the value of the answer, and the title to show."""

    value: Any
    title: str


class Prompter(Protocol):
    """Asks one question at a time. Ctrl-C raises KeyboardInterrupt, the end of the input EOFError."""

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
        """A line of text that starts as `default`."""
        import questionary

        return questionary.text(_wrap(message), default=default).unsafe_ask()

    def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
        """The value of one of `choices`; starts at the one of `default`."""
        import questionary

        # By position: for a choice with the value None, questionary returns the title.
        lines = [
            questionary.Choice(_wrap(choice.title, indent=5), value=number) for number, choice in enumerate(choices)
        ]
        start = lines[_find_position(choices, default)]
        return choices[
            questionary.select(_wrap(message), choices=lines, default=start, instruction=" ").unsafe_ask()
        ].value

    def confirm(self, message: str, default: bool = True) -> bool:
        """Yes or no; Enter is `default`."""
        import questionary

        return questionary.confirm(_wrap(message), default=default).unsafe_ask()


def _wrap(text: str, indent: int = 2) -> str:
    """Break a text at spaces: questionary cuts lines that are longer than the terminal."""
    # The mark before the text, and space for the cursor.
    width = max(20, shutil.get_terminal_size().columns - 6)
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)


class PlainPrompter:
    """Numbered lists and lines of text, through rich: works on any terminal. Reads answers from standard input."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def text(self, message: str, default: str = "") -> str:
        """A line of text; Enter is `default`, and '-' is an empty text."""
        hint = Text(f"{message} (- for none)" if default else message)
        answer = Prompt.ask(hint, console=self._console, default=default, show_default=bool(default)).strip()
        return "" if answer == "-" else answer

    def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
        """The value of the choice with the given number."""
        numbers = [str(number) for number in range(1, len(choices) + 1)]
        lines = [message, *(f"  {number}  {choice.title}" for number, choice in zip(numbers, choices, strict=True))]
        self._console.print("\n".join(lines), markup=False, highlight=False)
        start = numbers[_find_position(choices, default)]
        ask = f"number, 1 to {len(choices)}"
        answer = Prompt.ask(ask, console=self._console, choices=numbers, show_choices=False, default=start)
        return choices[int(answer) - 1].value

    def confirm(self, message: str, default: bool = True) -> bool:
        """Yes or no; Enter is `default`."""
        return Confirm.ask(Text(message), console=self._console, default=default)


def _find_position(choices: Sequence[Choice], default: Any) -> int:
    """The position of the default; 0 if it is not among the choices."""
    return next((number for number, choice in enumerate(choices) if choice.value == default), 0)


def make_prompter(env: Mapping[str, str]) -> Prompter:
    """The prompter for the kind of terminal that TERM names."""
    return PlainPrompter(make_console()) if env.get("TERM", "") in _PLAIN_TERMINALS else TerminalPrompter()


@contextlib.contextmanager
def hide_early_input(prompter: Prompter) -> Iterator[None]:
    """Keep the terminal from echoing what is typed between two questions: the next question shows it."""
    if not isinstance(prompter, TerminalPrompter) or not sys.stdin.isatty():
        yield  # a plain terminal shows what is typed itself
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
