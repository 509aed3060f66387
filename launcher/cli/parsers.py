"""Parsers of the subcommands, and the options that several of them have."""

from __future__ import annotations

import argparse
from typing import Any

from launcher.cli.commands import COMMANDS
from launcher.core.command_parser import CommandParser


def new_parser(name: str, **options: Any) -> CommandParser:
    """The parser of a subcommand, with `--debug`; `options` are those of `ArgumentParser`."""
    parser = CommandParser(
        f"launcher {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **{"description": COMMANDS[name].summary, **options},
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of usage errors too")
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option for config files."""
    parser.add_argument("--config", "-c", action="append", default=[], metavar="FILE",
                        help="YAML or JSON; a later file overrides an earlier one")  # fmt: skip


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option for the folder of the runs."""
    parser.add_argument("--runs_dir", "--runs-dir", default="runs", metavar="FOLDER", help="of the runs (default runs)")
