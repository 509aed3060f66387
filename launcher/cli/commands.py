"""The table of subcommands, for help, dispatch and completion."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class CommandEntry(Protocol):
    """The implementation of a subcommand: a module or an object with these two functions."""

    def build_parser(self) -> argparse.ArgumentParser:
        """The parser of its options."""
        ...

    def run(self, arguments: Sequence[str]) -> int:
        """Run it with the arguments after its name; returns the exit code."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes:
        summary: one line for the help.
        entry: `module` or `module:object`, a `CommandEntry`; imported when the command runs.
        takes_settings: whether settings of the config may follow as `--key value`.
        runs_on_ranks: whether every rank of a training runs it, so errors are reported once for all ranks.
        on_interrupt: message after Ctrl-C.
    """

    name: str
    summary: str
    entry: str
    takes_settings: bool = False
    runs_on_ranks: bool = False
    on_interrupt: str = ""

    def load(self) -> CommandEntry:
        """Import the implementation."""
        module, _, name = self.entry.partition(":")
        loaded: Any = importlib.import_module(module)
        return getattr(loaded, name) if name else loaded


_ON_CTRL_C = {
    "fit": "",  # with the command to start again
    "plan": "stopped by Ctrl-C; there is no plan",
}


def _training(name: str, summary: str) -> Command:
    entry = f"launcher.cli.config_commands:{name.upper()}"
    message = _ON_CTRL_C.get(name, "stopped by Ctrl-C; the run and its checkpoints are unchanged")
    return Command(name, summary, entry, takes_settings=True, runs_on_ranks=True, on_interrupt=message)


_TABLE = (
    _training("fit", "train (the default); without config and model, the built-in demo"),
    _training("plan", "show what fit would choose, and why, without training"),
    _training("validate", "evaluate a checkpoint of a run on its validation data"),
    _training("test", "evaluate a checkpoint of a run on its test data"),
    _training("predict", "write a run's predictions to its directory"),
    Command("run", "start the ranks of a plain PyTorch script, as torchrun does", "launcher.cli.run"),
    Command("submit", "queue the run on SLURM, or start it in the background here",
            "launcher.cli.submit", takes_settings=True),
    Command("status", "show the state of runs, across requeues", "launcher.cli.status"),
    Command("logs", "print the log of a rank", "launcher.cli.logs"),
    Command("cancel", "stop a run; its ranks save first", "launcher.cli.cancel"),
    Command("init", "write a config: asks for model, hardware, precision and logging", "launcher.wizard.command",
            takes_settings=True, on_interrupt="\ncancelled; nothing was written"),
    Command("convert", "write a checkpoint of any strategy in another format", "launcher.cli.convert"),
    Command("doctor", "check this machine and its cluster", "launcher.doctor.command"),
    Command("report", "write a page about a run, or compare two", "launcher.report.command"),
    Command("help", "show the options of a command", "launcher.cli.help"),
    Command("completion", "print a script that lets bash, zsh or fish complete", "launcher.cli.completion"),
)  # fmt: skip
COMMANDS = {command.name: command for command in _TABLE}
# The commands that evaluate a run.
EVALUATIONS = ("validate", "test", "predict")
_SYNONYMS = {
    "fit": "train training trainer learn start launch exec torchrun accelerate",
    "validate": "val valid eval evaluate evaluation",
    "predict": "inference infer generate",
    "submit": "sbatch queue sweep",
    "status": "list ls ps runs show jobs squeue top watch",
    "logs": "log tail output",
    "cancel": "stop kill abort scancel terminate",
    "init": "new create setup wizard configure config",
    "convert": "export consolidate merge safetensors",
    "doctor": "check diagnose info env",
    "report": "compare plot summary",
}
# Names that users try for our commands, by such a name.
OTHER_NAMES = {name: command for command, names in _SYNONYMS.items() for name in names.split()}
# Names for continuing a run, which `fit` does.
CONTINUE_NAMES = ("resume", "continue", "restart")
