"""A parser of command line options whose errors are one sentence with advice, as all other errors of the launcher."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from typing_extensions import override

from launcher.core.errors import CommandLineError

_ARGUMENT = re.compile(r"argument (\S+): (.*)", re.DOTALL)
_UNKNOWN = "unrecognized arguments: "


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a `CommandLineError`, and needs option names in full."""

    def list_options(self) -> list[str]:
        """The long options, in their order."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]

    @override
    def error(self, message: str) -> NoReturn:
        raise CommandLineError(self._explain(message))

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
        return f"{name}: {reason}; {see}"

    def _explain_unknown(self, given: str) -> str:
        options = self.list_options()
        close = difflib.get_close_matches(given.replace("_", "-"), options, n=1)
        hint = f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists the options"
        return f"`{self.prog}` has no {'option' if given.startswith('-') else 'argument'} {given}; {hint}"
