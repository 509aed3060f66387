"""The reference of the command line, from the parsers that print its help."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator
from unittest import mock

from docs.generate.markdown import code, table
from launcher.cli.main import run
from launcher.cli.settings import TITLE as SETTINGS_TITLE

_COMMAND = re.compile(r"^  (\w+) +(\S.*)$", re.MULTILINE)


def reference() -> str:
    """A section for each subcommand."""
    shown: set[str] = set()
    return "\n".join(_section(command, text, shown) for command, text in commands().items())


def commands() -> dict[str, str]:
    """Subcommand to what it does, as `launcher --help` lists them."""
    return dict(_COMMAND.findall(find_parser().format_help().partition("commands:")[2].partition("\n\n")[0]))


def find_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser that prints the help of a subcommand, or of the program."""
    found: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self)),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        run(["--help"] if command is None else [command, "--help"])
    return found[0]


def _section(command: str, summary: str, shown: set[str]) -> str:
    parser = find_parser(command)
    parts = [f"## `{command}`\n", f"{summary[:1].upper()}{summary[1:]}.\n"]
    more = (parser.description or "").partition("\n")[2].strip() or ""
    if more:
        parts.append(f"{more}\n")
    parts.append(f"```text\n{_usage(parser)}\n```\n")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            title = {"positional arguments": "", "options": ""}.get(group.title or "", group.title or "")
            parts += [f"**{title[:1].upper()}{title[1:]}**\n"] if title else []
            parts.append(
                table(["option" if actions[0].option_strings else "argument", "meaning"], map(_option, actions))
            )
    # Several commands share one text; the settings have a page of their own.
    text = (parser.epilog or "").partition(SETTINGS_TITLE)[0].strip()
    if text and text not in shown:
        shown.add(text)
        parts.append(f"```text\n{text}\n```\n")
    return "\n".join(parts)


def _usage(parser: argparse.ArgumentParser) -> str:
    text = " ".join(parser.format_usage().removeprefix("usage: ").split())
    return "\n".join(_wrapped(text, 76))


def _wrapped(text: str, width: int) -> Iterator[str]:
    line = ""
    # Options in brackets stay together.
    for part in re.findall(r"\[[^\]]*\]|\S+", text):
        if line and len(line) + len(part) + 1 > width:
            yield line
            line = "   "
        line = f"{line} {part}" if line else part
    yield line


def _option(action: argparse.Action) -> tuple[str, str]:
    # `--max-restarts` and `--max_restarts` are one option: the first spelling is shown.
    spellings = {spelling.replace("_", "-"): spelling for spelling in reversed(action.option_strings)}
    metavar = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    if not isinstance(metavar, str):
        metavar = " ".join(metavar)
    if not metavar and action.option_strings and action.nargs != 0:
        metavar = action.dest.upper()
    shown = ", ".join(sorted(spellings, key=len, reverse=True)) or metavar or action.dest
    value = f" {metavar}" if metavar and action.option_strings else ""
    return code(f"{shown}{value}".replace("%%", "%")), (action.help or "").replace("%%", "%")
