"""What a command accepts in addition to the settings, and what other tools call it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.cli.commands import COMMANDS, EVALUATIONS
from launcher.cli.main import CONFIG_FILES, format_command, is_script
from launcher.core.command_parser import CommandParser
from launcher.core.errors import CommandLineError, ConfigError
from launcher.core.gc_paused import quick_imports

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.config.suggestions import ClassFindings, CommandKeys

_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\.[A-Z]\w*")


def command_keys(parser: CommandParser, synonyms: Mapping[str, str]) -> CommandKeys:
    """The options of a parser, with the names that other tools have for them."""
    from launcher.config.suggestions import CommandKeys

    options = parser.list_options()
    # An option with two spellings is suggested with dashes.
    own = dict.fromkeys(dashed if (dashed := text.replace("_", "-")) in options else text for text in options)
    return CommandKeys(tuple(own), synonyms, _inspect)


def _inspect(config: RunConfig) -> ClassFindings:
    from launcher.config.suggestions import ClassFindings

    try:
        with quick_imports():
            from launcher.user_code.classes import inspect_classes
    except ImportError:
        return ClassFindings()  # no Lightning here: the settings are reported without the classes
    return inspect_classes(config)


def check_class_paths(config: RunConfig, keys: CommandKeys, *, has_all_modules: bool = True) -> None:
    """Import the classes if one of them is surely wrong, before ranks start or a job is queued.

    Without `has_all_modules`, a module that is missing here is not wrong: only the nodes may have it.

    Raises:
        ConfigError: lists every problem of the classes.
    """
    from launcher.user_code.source_check import is_surely_wrong

    is_wrong = is_surely_wrong(config, has_all_modules=has_all_modules)
    if is_wrong and keys.inspect is not None and (problems := keys.inspect(config).problems):
        raise ConfigError(problems)


def check_positionals(name: str, arguments: Sequence[str], overrides: Sequence[str], keys: CommandKeys) -> None:
    """Reject config files, scripts and classes that are given without an option, with the right command.

    Args:
        name: the command.
        arguments: all its arguments.
        overrides: those that are not its own options.
        keys: what it accepts.

    Raises:
        CommandLineError: contains the command to run instead.
    """
    from launcher.config.command_line import split_arguments

    found = [str(each.text) for each in split_arguments(overrides) if each.path is None]
    if named := [given for given in found if given in COMMANDS]:
        rest = list(arguments)
        rest.remove(named[0])
        command = format_command(named[0], *rest)
        raise CommandLineError(f"{named[0]} is a command, and a command is given first; write:\n  {command}")
    files = [given for given in found if given.endswith(CONFIG_FILES)]
    if files:
        command = format_command(name, *_with_option("--config", files, arguments))
        raise CommandLineError(f"{files[0]} is given without an option; a config file needs --config:\n  {command}")
    for given in found:
        if _CLASS.fullmatch(given):
            command = format_command(name, *_with_option("--model", [given], arguments))
            raise CommandLineError(f"{given} is given without an option; a model needs --model:\n  {command}")
        if is_script(given) and (name != "submit" or "--script" in keys.options):
            what = "a module" if given == "-m" else f"the script {given}"
            # A script has no config of the launcher's.
            rest = _submit_script(given, arguments) if name == "submit" else ["run", *_without_config(arguments)]
            command = format_command(*rest)
            raise CommandLineError(f"{what} is not started like this; write:\n  {command}")
        if name in EVALUATIONS:
            command = format_command(name, *_with_option("--name", [given], arguments))
            raise CommandLineError(f"{given} is given without an option; a run needs --name:\n  {command}")


def _with_option(option: str, values: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The arguments with an option before each of the values that has none."""
    corrected: list[str] = []
    for previous, given in itertools.pairwise(["", *arguments]):
        has_option = previous in (option, "-c")
        corrected += [option, given] if given in values and not has_option else [given]
    return corrected


def _without_config(arguments: Sequence[str]) -> list[str]:
    """The arguments without a config, which a script does not have."""
    options = ("--config", "-c")
    pairs = itertools.pairwise(["", *arguments])
    return [given for previous, given in pairs if previous not in options and given.partition("=")[0] not in options]


def _submit_script(script: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of `submit` with the option for a script, whose own arguments follow `--`."""
    position = list(arguments).index(script)
    after = arguments[position + 1 :]
    return ["submit", *arguments[:position], "--script", script, *(["--", *after] if after else [])]
