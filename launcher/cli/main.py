"""The entry point of the command line: finds the subcommand and runs it. Help imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.commands import COMMANDS, CONTINUE_NAMES, OTHER_NAMES
from launcher.cli.error_boundary import run_with_error_boundary
from launcher.core.distribution import __version__
from launcher.core.wrapping import print_message

_DEFAULT = "fit"
# The command for plain scripts.
_SCRIPTS = "run"
CONFIG_FILES = (".yaml", ".yml", ".json")
SEE_SETTINGS = "all keys, with types and defaults: at the end of launcher fit --help"
EPILOG = f"""\
settings, each of them a key of the config file too:
  --model my_pkg.MyModule   --model.init_args.lr 1e-4   --data my_pkg.MyData
  --trainer.max_epochs 3    --precision bf16-mixed      --global_batch_size 256
  --name my-run             --resume auto|PATH|none     --wandb.mode offline
  {SEE_SETTINGS}

exit codes:
  0 done   1 training failed   2 usage or config
  75 preempted on SLURM, saved and queued again
  128+N ended by signal N: 130 Ctrl-C, 143 SIGTERM (saved);
        137 SIGKILL, 139 crash (not saved)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `launcher` without a command."""
    listed = "\n".join(f"  {command.name:12}{command.summary}" for command in COMMANDS.values())
    scripts = "\n`launcher train.py` and `launcher -m module` are the same as `launcher run ...`."
    scripts = scripts if _SCRIPTS in COMMANDS else ""
    parser = argparse.ArgumentParser(
        "launcher",
        usage="launcher [COMMAND] [options] [--key value ...]",
        description="Train a PyTorch Lightning model on a laptop, under torchrun or on SLURM,\nfrom one config.\n\n"
        f"commands:\n{listed}\n\n`launcher COMMAND --help` shows the options of a command.{scripts}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"launcher {__version__}")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    name, *rest = arguments or [_DEFAULT]
    if name in ("-h", "--help", "--version"):
        build_parser().parse_args(arguments)
    if is_script(name) and _SCRIPTS in COMMANDS:
        name, rest = _SCRIPTS, list(arguments)
    elif name.startswith("-"):
        name, rest = _DEFAULT, list(arguments)
        if _asks_about_script(rest) and _SCRIPTS in COMMANDS:
            name, rest = _SCRIPTS, ["--help"]
    command = COMMANDS.get(name)
    if command is None:
        print_message(f"error: {describe_unknown_command(name, rest)}")
        return 2
    _import_from_here()
    return run_with_error_boundary(command, lambda: command.load().run(rest), debug="--debug" in rest)


def is_script(argument: str) -> bool:
    """Whether an argument begins a script's command line: `train.py ...` or `-m module ...`."""
    return argument == "-m" or argument.endswith(".py")


def _asks_about_script(arguments: Sequence[str]) -> bool:
    """Whether `--help` is given with a script and options of `launcher run`, but without the command."""
    return bool({"-h", "--help"} & set(arguments)) and any(map(is_script, arguments))


def _import_from_here() -> None:
    """Make the current directory importable, as `python -m` does."""
    here = str(Path.cwd())
    if sys.path[0] not in ("", here):
        sys.path.insert(0, here)


def describe_unknown_command(name: str, rest: Sequence[str] = ()) -> str:
    """What the user may have meant."""
    import difflib

    if name.endswith(CONFIG_FILES):
        given = rest if rest and rest[0] in COMMANDS else [_DEFAULT, *rest]
        command = format_command(given[0], "--config", name, *given[1:])
        return f"{name} is given without an option; a config file needs --config:\n  {command}"
    known = {**dict.fromkeys(CONTINUE_NAMES, ""), **OTHER_NAMES, **{each: each for each in COMMANDS}}
    typed = name.lower()
    close = [typed] if typed in known else difflib.get_close_matches(typed, known, n=1)
    if not close:
        return f"there is no command {name!r}; commands are {', '.join(COMMANDS)}"
    if not known[close[0]]:
        return f"there is no command {name!r}; did you mean:\n  {_continue_run(rest)}"
    meant = known[close[0]]
    if meant == _DEFAULT and any(map(is_script, rest)) and _SCRIPTS in COMMANDS:
        meant = _SCRIPTS
    command = f"\n  {format_command(meant, *rest)}" if rest else ""
    return f"there is no command {name!r}; did you mean {meant}?{command}"


def _continue_run(rest: Sequence[str]) -> str:
    """The command that continues the run, or the run of the config, that is given first."""
    given = bool(rest) and not rest[0].startswith("-")
    run, options = (rest[0], rest[1:]) if given else ("NAME", rest)
    if run.endswith(CONFIG_FILES):
        return format_command(_DEFAULT, "--config", run, "--resume", "auto", *options)
    from launcher.runs.continuation import make_recorded_command, read_recorded_plan

    folder = Path(run if "/" in run else f"runs/{run}")
    return format_command(*make_recorded_command(folder, read_recorded_plan(folder)).arguments, *options)


def format_command(*arguments: str) -> str:
    """A command line of the launcher to copy."""
    import shlex

    from launcher.core.secrets import hide_in_arguments

    return shlex.join(["launcher", *hide_in_arguments(arguments)])
