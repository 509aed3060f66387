"""`launcher help [COMMAND]`: the same as `launcher COMMAND --help`."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.cli.commands import COMMANDS
from launcher.cli.main import build_parser as build_main_parser
from launcher.cli.main import describe_unknown_command
from launcher.cli.parsers import new_parser
from launcher.core.command_parser import CommandParser
from launcher.core.errors import CommandLineError


def build_parser() -> CommandParser:
    """The parser of the command's options."""
    parser = new_parser("help")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="the command (default: the list of commands)")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print the help; returns the exit code."""
    name = build_parser().parse_args(arguments).command
    if name is not None and name not in COMMANDS:
        raise CommandLineError(describe_unknown_command(name))
    parser = build_main_parser() if name is None else COMMANDS[name].load().build_parser()
    parser.print_help()
    return 0
