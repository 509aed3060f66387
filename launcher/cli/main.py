"""The entry point of the command line: finds the subcommand and runs it. Help imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.commands import COMMANDS
from launcher.cli.error_boundary import print_line, run_with_error_boundary
from launcher.core.distribution import __version__

_DEFAULT = "fit"
EPILOG = """\
settings, each of them a key of the config file too:
  --model my_pkg.MyModule   --model.init_args.lr 1e-4   --data my_pkg.MyData
  --trainer.max_epochs 3    --precision bf16-mixed      --global_batch_size 256
  --name my-run             --resume auto|PATH|none     --wandb.mode offline
  all keys with their defaults: launcher fit --print-config

exit codes:
  0 done   1 training failed   2 usage or config   75 preempted on SLURM, saved and queued again
  128+N ended by signal N: 130 Ctrl-C, 143 SIGTERM (saved); 137 SIGKILL, 139 crash (not saved)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `launcher` without a command."""
    listed = "\n".join(f"  {command.name:12}{command.summary}" for command in COMMANDS.values())
    parser = argparse.ArgumentParser(
        "launcher",
        usage="launcher [COMMAND] [options] [--key value ...]",
        description="Train a PyTorch Lightning model on a laptop, under torchrun or on SLURM, from one config.\n\n"
        f"commands:\n{listed}\n\n`launcher COMMAND --help` shows the options of a command.",
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
    if name.startswith("-"):
        name, rest = _DEFAULT, list(arguments)
    command = COMMANDS.get(name)
    if command is None:
        return _report_unknown_command(name)
    _import_from_here()
    return run_with_error_boundary(command, lambda: command.load().run(rest), debug="--debug" in rest)


def _import_from_here() -> None:
    """Make the current directory importable, as `python -m` does."""
    here = str(Path.cwd())
    if sys.path[0] not in ("", here):
        sys.path.insert(0, here)


def _report_unknown_command(name: str) -> int:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
    print_line(f"error: there is no command {name!r}; {hint}")
    return 2
