"""`launcher completion SHELL`: a script that lets bash, zsh or fish complete commands, options and their values."""

from __future__ import annotations

import argparse
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.cli.commands import COMMANDS
from launcher.cli.parsers import new_parser
from launcher.config.presets import ALL_PRESETS
from launcher.config.schema import config_fields
from strategies.registry import list_strategy_names

# zsh's array of the typed arguments.
_ZSH_ARGUMENTS = "words"


@dataclass(frozen=True, slots=True)
class Completion:
    """A command's summary and what can follow its name: long options, and settings with their dotted paths."""

    summary: str
    options: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = new_parser(
        "completion",
        description="Print a script that completes the launcher's commands, options and their values.",
        epilog="bash:\n  launcher completion bash > ~/.local/share/bash-completion/completions/launcher\n"
        "zsh, with ~/.zfunc in fpath:\n  launcher completion zsh > ~/.zfunc/_launcher\n"
        "fish:\n  launcher completion fish > ~/.config/fish/completions/launcher.fish",
    )
    parser.add_argument("shell", choices=sorted(_WRITERS))
    return parser


def run(arguments: Sequence[str]) -> int:
    """Print the script of a shell; returns the exit code."""
    shell = build_parser().parse_args(arguments).shell
    sys.stdout.write(_WRITERS[shell](_completions(), _values()))
    return 0


def _completions() -> dict[str, Completion]:
    """Every command with its options, read from its parser."""
    settings = tuple(f"--{path}" for path, _ in config_fields())
    return {
        name: Completion(
            command.summary,
            (*_long_options(command.load().build_parser()), *(settings if command.takes_settings else ())),
        )
        for name, command in COMMANDS.items()
    }


def _long_options(parser: argparse.ArgumentParser) -> list[str]:
    return [text for action in parser._actions for text in action.option_strings if text.startswith("--")]


def _values() -> dict[str, tuple[str, ...]]:
    """The valid values of each option that has a fixed set of them."""
    found: dict[str, tuple[str, ...]] = {}
    for path, info in config_fields():
        kinds = typing.get_args(info.hint) or (info.hint,)
        kinds = (info.hint,) if typing.get_origin(info.hint) is typing.Literal else kinds
        values = [v for kind in kinds if typing.get_origin(kind) is typing.Literal for v in typing.get_args(kind)]
        if bool in kinds:
            values += ["true", "false"]
        if values:
            found[f"--{path}"] = tuple(map(str, values))
    for command in COMMANDS.values():
        for action in command.load().build_parser()._actions:
            if action.choices:
                found.update(dict.fromkeys(action.option_strings, tuple(action.choices)))
    found["--strategy"] = list_strategy_names()
    found["--preset"] = ALL_PRESETS
    return found


def _cases(cases: Mapping[str, str]) -> str:
    return "\n".join(f"    {name}) {body} ;;" for name, body in cases.items())


def _bash(found: Mapping[str, Completion], choices: Mapping[str, Sequence[str]]) -> str:
    options = {name: f'offered="{" ".join(c.options)}"' for name, c in found.items()}
    options["*"] = options["fit"]
    values = {option: f'offered="{" ".join(chosen)}"' for option, chosen in choices.items()}
    # File names never reach `compgen -W`, which would expand them.
    return f"""\
_launcher() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} offered=
  COMPREPLY=()
  case $prev in
{_cases(values)}
  esac
  if [ -z "$offered" ]; then
    case ${{COMP_WORDS[1]}} in
{_cases(options)}
    esac
    if [[ $cur != -* && ( $COMP_CWORD -eq 1 || "$COMP_CWORD ${{COMP_WORDS[1]}}" == "2 help" ) ]]; then
      offered="{" ".join(found)}"
    elif [[ $cur != -* ]]; then
      mapfile -t COMPREPLY < <(compgen -f -- "$cur")
      return
    fi
  fi
  mapfile -t COMPREPLY < <(compgen -W "$offered" -- "$cur")
}}
complete -o filenames -F _launcher launcher
"""


def _zsh(found: Mapping[str, Completion], choices: Mapping[str, Sequence[str]]) -> str:
    listed = " ".join(shlex.quote(f"{name}:{command.summary}") for name, command in found.items())
    options = {name: f"options=({' '.join(c.options)})" for name, c in found.items()}
    options["*"] = options["fit"]
    values = {option: f"compadd -- {' '.join(chosen)}; return" for option, chosen in choices.items()}
    return f"""\
#compdef launcher
_launcher() {{
  local -a commands options
  commands=({listed})
  case ${_ZSH_ARGUMENTS}[CURRENT-1] in
{_cases(values)}
  esac
  case ${_ZSH_ARGUMENTS}[2] in
{_cases(options)}
  esac
  if [[ $PREFIX == -* ]]; then compadd -- $options
  elif (( CURRENT == 2 )) || [[ "$CURRENT ${_ZSH_ARGUMENTS}[2]" == "3 help" ]]; then _describe command commands
  else _files
  fi
}}
compdef _launcher launcher
"""


def _fish(found: Mapping[str, Completion], choices: Mapping[str, Sequence[str]]) -> str:
    lines = [f"complete -c launcher -n __fish_use_subcommand -f -a {name} -d {_fish_quoted(command.summary)}"
             for name, command in found.items()]  # fmt: skip
    lines.append(f"complete -c launcher -n '__fish_seen_subcommand_from help' -f -a '{' '.join(found)}'")
    for name, command in found.items():
        when = _fish_quoted(f"__fish_seen_subcommand_from {name}")
        for option in command.options:
            values = choices.get(option, ())
            offered = f" -x -a {_fish_quoted(' '.join(values))}" if values else ""
            lines.append(f"complete -c launcher -n {when} -l {option[2:]}{offered}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_WRITERS: Mapping[str, Callable[[Mapping[str, Completion], Mapping[str, Sequence[str]]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
