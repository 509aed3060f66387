"""A parser of command line options whose errors are one sentence with advice, as all other errors of the launcher."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from typing_extensions import override

from launcher.core.errors import CommandLineError

_ARGUMENT = re.compile(r"argument (\S+): (.*)", re.DOTALL)
_CHOICE = re.compile(r"invalid choice: '(.+?)' \((.*)\)", re.DOTALL)
_UNKNOWN = "unrecognized arguments: "
_CUTOFF = 0.7


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a `CommandLineError`, and needs option names in full.

    Attributes:
        find_advice: what to do instead of an unknown option, by its name without dashes before it; empty if that is
            not known.
    """

    find_advice: Callable[[str], str] = staticmethod(lambda name: "")

    def list_options(self) -> list[str]:
        """The long options, in their order."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]

    def find_close_option(self, given: str) -> str | None:
        """The option with a similar name."""
        close = difflib.get_close_matches(_bare(given), map(_bare, self.list_options()), n=1, cutoff=_CUTOFF)
        return f"--{close[0]}" if close else None

    @override
    def error(self, message: str) -> NoReturn:
        raise CommandLineError(self._explain(message))

    @override
    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The options that an abbreviation may mean; an option with two spellings is one."""
        found: list[Any] = super()._get_option_tuples(option_string)
        return list({id(each[0]): each for each in reversed(found)}.values())[::-1]

    def _explain(self, message: str) -> str:
        if message.startswith(_UNKNOWN):
            return self._explain_unknown(message.removeprefix(_UNKNOWN).split(" ")[0].partition("=")[0])
        see = f"`{self.prog} --help` lists the options"
        found = _ARGUMENT.match(message)
        if found is None:
            return f"{message}; {see}"
        # As in `--config/-c`.
        names, reason = found[1].split("/"), found[2]
        name = next((each for each in names if each.startswith("--")), names[0])
        if reason.startswith("expected") and "argument" in reason:
            value = next(
                (action.metavar for action in self._actions if name in action.option_strings and action.metavar),
                "VALUE",
            )
            return f"{name} is given without a value; write {name} {value}"
        if (choice := _CHOICE.match(reason)) is not None:
            close = suggest_choice(choice[1], re.findall(r"'(.+?)'", choice[2]))
            return f"{name}: {reason}{close or f'; {see}'}"
        return f"{name}: {reason}; {see}"

    def _explain_unknown(self, given: str) -> str:
        close = self.find_close_option(given)
        hint = self.find_advice(given.lstrip("-")) if given.startswith("-") else ""
        if not hint:
            hint = f"did you mean {close}?" if close else f"`{self.prog} --help` lists the options"
        return f"`{self.prog}` has no {'option' if given.startswith('-') else 'argument'} {given}; {hint}"


def suggest_choice(given: object, choices: Iterable[str]) -> str:
    """The end of an error about a value: the choice with a similar name, or the only one that continues it."""
    typed, names = str(given).strip().lower(), {name.lower(): name for name in choices}
    longer = [name for name in names if typed and name.startswith(typed)]
    if len(longer) > 1:
        return ""  # the error lists them
    close = longer or difflib.get_close_matches(typed, names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def _bare(option: str) -> str:
    """The name of an option in its spelling with dashes, without those before it."""
    return option.lstrip("-").replace("_", "-")
