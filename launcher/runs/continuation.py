"""What a user reads when a run stops early: what was saved, and the command that continues the run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import read_step
from launcher.core.errors import Interrupted, describe_stop_signal
from launcher.core.secrets import hide_in_arguments
from launcher.runs.selection import find_last_checkpoint
from launcher.runs.submission_record import FOLDER as SUBMISSIONS
from launcher.runs.submission_record import read_records

_PROGRAM = "launcher"
# torchrun's default port of a rendezvous.
_PORT = 29400
# The back end of `submit` that needs no `--cluster`.
_SLURM = "slurm"
# The name of a run that was given none: date, time and a part of the config's digest.
_MADE_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}(-\d+)?")


@dataclass(frozen=True, slots=True)
class Stop:
    """How a run stopped early.

    Attributes:
        signal_number: the signal that stopped it.
        step: optimizer steps done; 0 before the first one.
        saved: the checkpoint that was written because of the signal; None if none was.
        run: the run directory; None if there is none yet.
        at_once: whether a second signal ended it, without saving.
        script: the arguments with which a script continues, `name` and the checkpoint's; None for a command line.
    """

    signal_number: int
    step: int = 0
    saved: Path | None = None
    run: Path | None = None
    at_once: bool = False
    script: str | None = None

    @classmethod
    def of(cls, error: Interrupted) -> Stop:
        """The stop that an error reports."""
        saved = None if error.checkpoint is None else Path(error.checkpoint)
        return cls(error.signal_number, error.step, saved, None if error.run is None else Path(error.run))


def describe_stop(stop: Stop) -> str:
    """What stopped the run, what is saved, and on a line of its own the command to continue, to be pasted."""
    signal_name = describe_stop_signal(stop.signal_number)
    newest = None if stop.run is None else find_last_checkpoint(stop.run / "checkpoints")
    if stop.saved is not None:
        text = f"stopped by {signal_name} after step {stop.step}; saved {shorten(stop.saved)}"
    else:
        begin = f"second {signal_name}: ended at once" if stop.at_once else f"stopped by {signal_name}"
        where = f"after step {stop.step}" if stop.step > 0 else "before the first step"
        if newest is not None:
            kept = read_step(newest)
            at = "" if kept is None else f", step {kept}"
            text = f"{begin} {where}; the last checkpoint is {shorten(newest)}{at}"
        else:
            text = f"{begin} {where}; nothing was saved"
    if stop.script is not None and stop.run is not None:
        changed = stop.script if newest is not None else f"another name than {stop.run.name}"
        return f"{text}\nto {_verb(newest)}, run the script again with {changed}"
    command = describe_command(stop.run, has_trained=stop.step > 0)
    return text if command is None else f"{text}\n{command}"


def describe_command(run: Path | None, *, has_trained: bool = True) -> str | None:
    """The command that continues the run or starts it again, on a line of its own; None in a script."""
    newest = None if run is None else find_last_checkpoint(run / "checkpoints")
    command = find_command_to_continue(run, has_checkpoint=newest is not None, has_trained=has_trained)
    return None if command is None else f"to {_verb(newest)}:\n{command}"


def _verb(checkpoint: Path | None) -> str:
    return "start again" if checkpoint is None else "continue"


def find_command_to_continue(run: Path | None, *, has_checkpoint: bool = True, has_trained: bool = True) -> str | None:
    """The command line of this process, or of torchrun, completed so that it continues the run; None in a script.

    Without a checkpoint the command starts again, with another name if the run has trained under a given one.
    """
    command = find_command(sys.orig_argv, os.environ, _read_parent_command())
    if command is None:
        return None
    if run is not None:
        recorded = make_recorded_command(run, read_recorded_plan(run))
        # The job's own command reads a file of the submission.
        is_job = any(f"/{SUBMISSIONS}/" in argument for argument in command)
        # mpirun and the like are not in the command of a rank.
        if is_job or (recorded.nodes == 1 and _is_rank_of_another_program(os.environ)):
            command = ["python", "-m", _PROGRAM, *_without_options(recorded.arguments, {"--resume"})]
    if run is None or (not has_checkpoint and (not has_trained or _MADE_NAME.fullmatch(run.name))):
        return format_command(command, {})
    if has_checkpoint:
        return format_command(command, {"--name": run.name, "--resume": "auto"})
    return format_command(command, {"--name": find_free_name(run), "--resume": "none"})


@dataclass(frozen=True, slots=True)
class RecordedCommand:
    """The command that continues a run on the ranks that it had, by the records in its directory.

    Attributes:
        arguments: those of the launcher.
        nodes: on how many nodes the user gives it.
    """

    arguments: tuple[str, ...]
    nodes: int = 1

    @property
    def text(self) -> str:
        """The command for a shell."""
        return shlex.join([_PROGRAM, *self.arguments])

    @property
    def place(self) -> str:
        """Where the command is given, if that is not one machine."""
        return f"on each of the {self.nodes} nodes" if self.nodes > 1 else ""


def make_recorded_command(run: Path, plan: Mapping[str, Any]) -> RecordedCommand:
    """The command that continues a run that `launcher fit`, torchrun or a job started.

    Its config may leave the number of ranks to the machine, so the command has them, from the plan of the last attempt.
    A plan that does not state them, as in a damaged file, adds no option.
    """
    config = ("--config", shorten(run / "config.yaml"))
    ranks = _read_ranks(plan)
    nodes, per_node = ranks or (1, 1)
    has_devices = ranks is not None and plan.get("device_kind", "cpu") != "cpu"
    records = read_records(run)
    if records:
        cluster = str(records[-1].get("cluster") or _SLURM)
        options = () if nodes == 1 else ("--nodes", str(nodes))
        if cluster != _SLURM:
            options += ("--cluster", cluster)
        elif has_devices:
            # The config of a job states its ranks, but not that it needs their GPUs.
            options += ("--gpus-per-node", str(per_node))
        return RecordedCommand(("submit", *config, "--resume", "auto", *options))
    options = ()
    if nodes > 1:
        hosts = plan.get("hosts")
        host = hosts[0] if isinstance(hosts, list | tuple) and hosts else "HOST"
        options = ("--nnodes", str(nodes), "--rdzv-endpoint", f"{host}:{_PORT}")
    # Without the option a machine without GPUs starts one rank, and another one a rank for each GPU.
    if per_node > 1 or nodes > 1 or has_devices:
        options += ("--nproc-per-node", str(per_node))
    return RecordedCommand(("fit", *config, "--resume", "auto", *options), nodes)


def _read_ranks(plan: Mapping[str, Any]) -> tuple[int, int] | None:
    """Nodes and ranks on each node; None if the plan does not state them."""
    ranks, nodes = plan.get("world_size"), plan.get("num_nodes")
    if not isinstance(ranks, int) or not isinstance(nodes, int) or not 0 < nodes <= ranks or ranks % nodes:
        return None
    return nodes, ranks // nodes


def read_recorded_plan(run: Path) -> Mapping[str, Any]:
    """The plan of the run's last attempt as plain values; empty if there is none that can be read."""
    try:
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _is_rank_of_another_program(env: Mapping[str, str]) -> bool:
    """Whether neither torchrun nor the launcher has started this rank, which is one of several."""
    return "TORCHELASTIC_RUN_ID" not in env and env.get("WORLD_SIZE", "1") != "1"


def find_free_name(run: Path) -> str:
    """The name of a run with a number that no run beside it has."""
    return next(name for n in itertools.count(2) if not (run.parent / (name := f"{run.name}-{n}")).exists())


def find_command(own: Sequence[str], env: Mapping[str, str], parent: Sequence[str]) -> list[str] | None:
    """The command line that the user typed, from those of this process and its parent. Pure."""
    if "TORCHELASTIC_RUN_ID" in env:
        for number, argument in enumerate(parent):
            if Path(argument).name == "torchrun":
                return ["torchrun", *parent[number + 1 :]]
            if argument == "torch.distributed.run":
                return list(parent)
    for number, argument in enumerate(own[:-1], start=1):
        if argument == "-m" and own[number] == _PROGRAM:
            return list(own)
    script = next((number for number, argument in enumerate(own) if Path(argument).name == _PROGRAM), None)
    if script in (0, 1):
        return [_PROGRAM, *own[script + 1 :]]
    return None


def format_command(command: Sequence[str], options: Mapping[str, str]) -> str:
    """The command line for a shell, without secrets, with these options in place of earlier ones. Pure."""
    arguments = list(command)
    if options:
        added = [text for option in options.items() for text in option]
        arguments = [*_without_options(arguments, options), *added]
    return shlex.join(hide_in_arguments(arguments))


def _without_options(arguments: Sequence[str], options: Container[str]) -> list[str]:
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not is_value and key not in options:
            kept.append(argument)
        is_value = not is_value and key in options and not equals
    return kept


def _read_parent_command() -> list[str]:
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []  # not Linux, or it has ended
    return [part.decode(errors="replace") for part in text.split(b"\0")[:-1]]


def shorten(path: Path) -> str:
    """Relative to the current directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
