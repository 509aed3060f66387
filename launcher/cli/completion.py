"""`launcher completion SHELL`: a script that lets bash, zsh or fish complete commands, options and their values."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.config.schema import config_fields
from strategies.registry import list_strategy_names

_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@dataclass(frozen=True, slots=True)
class Command:
    """What can follow a command's name.

    Attributes:
        text: what it does.
        options: long options, and settings of the config with their dotted paths.
    """

    text: str
    options: tuple[str, ...]


def run(words: Sequence[str]) -> int:
    """Print the script.

    Args:
        words: the shell's name.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        "launcher completion",
        description="Print a script that completes the launcher's commands, options and their values.",
        epilog="bash:  launcher completion bash > ~/.local/share/bash-completion/completions/launcher\n"
        "zsh:   launcher completion zsh > ~/.zfunc/_launcher    (with ~/.zfunc in fpath)\n"
        "fish:  launcher completion fish > ~/.config/fish/completions/launcher.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=sorted(_WRITERS))
    shell = parser.parse_args(words).shell
    sys.stdout.write(_WRITERS[shell](commands(), values()))
    return 0


def commands() -> dict[str, Command]:
    """Every command, with what its own help says."""
    from launcher.cli.main import _COMMANDS, _TOOLS, build_parser

    found: dict[str, Command] = {}
    settings = tuple(f"--{path}" for path, _ in config_fields())
    for name, text in _COMMANDS.items():
        options = build_parser(name).format_help().partition("settings, each")[0]
        found[name] = Command(text, (*_options(options), *settings))
    for name, (text, module) in _TOOLS.items():
        said = io.StringIO()
        if module != __name__:
            with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
                importlib.import_module(module).run(["--help"])
        found[name] = Command(text, _options(said.getvalue()))
    return found


def values() -> dict[str, tuple[str, ...]]:
    """For each setting that takes one of a few words: those words."""
    found: dict[str, tuple[str, ...]] = {}
    for path, info in config_fields():
        kinds = typing.get_args(info.hint) or (info.hint,)
        kinds = (info.hint,) if typing.get_origin(info.hint) is typing.Literal else kinds
        words = [w for kind in kinds if typing.get_origin(kind) is typing.Literal for w in typing.get_args(kind)]
        if bool in kinds:
            words += ["true", "false"]
        if words:
            found[f"--{path}"] = tuple(map(str, words))
    found["--strategy"] = list_strategy_names()
    return found


def _options(text: str) -> tuple[str, ...]:
    """The long options of a help text."""
    return tuple(dict.fromkeys(_OPTION.findall(text.partition("options:")[2])))


def _cases(cases: Mapping[str, str]) -> str:
    return "\n".join(f"    {name}) {body} ;;" for name, body in cases.items())


def _bash(found: Mapping[str, Command], choices: Mapping[str, Sequence[str]]) -> str:
    options = {name: f'words="{" ".join(c.options)}"' for name, c in found.items()}
    options["*"] = options["fit"]
    told = {option: f'words="{" ".join(words)}"' for option, words in choices.items()}
    # Names of files are never words of `compgen -W`, which would expand them.
    return f"""\
_launcher() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words=
  COMPREPLY=()
  case $prev in
{_cases(told)}
  esac
  if [ -z "$words" ]; then
    case ${{COMP_WORDS[1]}} in
{_cases(options)}
    esac
    if [ "$COMP_CWORD" -eq 1 ] && [[ $cur != -* ]]; then words="{" ".join(found)}"
    elif [[ $cur != -* ]]; then
      mapfile -t COMPREPLY < <(compgen -f -- "$cur")
      return
    fi
  fi
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}}
complete -o filenames -F _launcher launcher
"""


def _zsh(found: Mapping[str, Command], choices: Mapping[str, Sequence[str]]) -> str:
    listed = " ".join(shlex.quote(f"{name}:{command.text}") for name, command in found.items())
    options = {name: f"options=({' '.join(c.options)})" for name, c in found.items()}
    options["*"] = options["fit"]
    told = {option: f"compadd -- {' '.join(words)}; return" for option, words in choices.items()}
    return f"""\
#compdef launcher
_launcher() {{
  local -a commands options
  commands=({listed})
  case $words[CURRENT-1] in
{_cases(told)}
  esac
  case $words[2] in
{_cases(options)}
  esac
  if [[ $PREFIX == -* ]]; then compadd -- $options
  elif (( CURRENT == 2 )); then _describe command commands
  else _files
  fi
}}
compdef _launcher launcher
"""


def _fish(found: Mapping[str, Command], choices: Mapping[str, Sequence[str]]) -> str:
    lines = [f"complete -c launcher -n __fish_use_subcommand -f -a {name} -d {_fish_quoted(command.text)}"
             for name, command in found.items()]  # fmt: skip
    for name, command in found.items():
        when = _fish_quoted(f"__fish_seen_subcommand_from {name}")
        for option in command.options:
            words = choices.get(option) if name in ("fit", "plan") else None
            own = f" -x -a {_fish_quoted(' '.join(words))}" if words else ""
            lines.append(f"complete -c launcher -n {when} -l {option[2:]}{own}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_WRITERS: Mapping[str, Callable[[Mapping[str, Command], Mapping[str, Sequence[str]]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
