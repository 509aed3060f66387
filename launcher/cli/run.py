"""`launcher run`: ranks of a plain PyTorch script, with torchrun's flags."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.cli.parsers import new_parser
from launcher.cli.script_target import check_script, find_misplaced_options, has_module
from launcher.cli.torchrun_flags import add_torchrun_flags, read_flags, read_hidden_ranks
from launcher.config.launch_options import read_launch_options
from launcher.config.synonyms import find_advice
from launcher.core.command_parser import CommandParser
from launcher.core.errors import LaunchError, Problem
from launcher.core.secrets import hide_in_arguments

if TYPE_CHECKING:
    from launcher.jobs.submission import ScriptCommand

_DESCRIPTION = """\
start the ranks of a PyTorch script that calls init_process_group itself

The script runs as under torchrun: the same environment variables, sys.argv,
__main__ and working directory. It needs no Lightning. The output of every rank
is in runs/NAME/logs/rank-<r>.log; `launcher status`, `launcher logs` and
`launcher report` know the run by its name."""
_EPILOG = """\
examples:
  launcher run --nproc-per-node 8 train.py --lr 1e-3
  launcher run --nproc-per-node gpu --max-restarts 3 -m pkg.train --size 3
  launcher run --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29400 train.py

exit codes:
  0 done   2 usage   128+N stopped by signal N   otherwise that of the rank that
  failed first
"""
_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


def build_parser() -> CommandParser:
    """The parser of the command's options."""
    usage = "launcher run [options] SCRIPT.py|-m MODULE [arguments of the script]"
    parser = new_parser("run", usage=usage, description=_DESCRIPTION, epilog=_EPILOG)
    # As torchrun: `--nnode 1` is `--nnodes 1`.
    parser.allow_abbrev = True
    parser.find_advice = find_advice
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as in `python -m`")
    parser.add_argument("--name", help="name of the run (default: date and script); an existing one is continued")
    parser.add_argument("--runs-dir", "--runs_dir", "--log-dir", "--log_dir", dest="runs_dir", metavar="FOLDER",
                        help="of the runs (default runs)")  # fmt: skip
    parser.add_argument("--preload", metavar="MODULE,...",
                        help="modules that are imported once for all ranks, or none (default: torch, and what the head "
                        "of the script imports from installed packages)")  # fmt: skip
    add_torchrun_flags(parser)
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Start the ranks of this node and wait for them; returns the exit code."""
    options = build_parser().parse_args(list(arguments))
    flags = read_flags(options, os.environ)
    flags["nproc_per_node"] = flags["nproc_per_node"] or "1"
    hides = read_hidden_ranks(flags)
    # All ranks are shown unless the user selects some.
    launch = read_launch_options({**flags, "terminal_ranks": flags["terminal_ranks"] or "all"})
    check_name(options.name)
    preload = read_preload(options.preload)
    check_preload(preload or ())
    kind = check_script(options.script, is_module=options.module, is_program=options.no_python)
    for given in find_misplaced_options(options.arguments):
        sys.stderr.write(f"notice: {given} is an argument of the script; options of `launcher run` go before it\n")
    from launcher.agent.script_main import ScriptTask, find_unset_variables
    from launcher.agent.script_start import ScriptStart, start_script
    from launcher.process.socket_folder import socket_folder
    from launcher.process.titles import prepare_titles

    prepare_titles()
    task = ScriptTask(
        kind,
        options.script,
        tuple(options.arguments),
        search_path=tuple(find_search_path(sys.path, Path.cwd(), sys.argv[0])),
        is_safe_path=bool(os.environ.get("PYTHONSAFEPATH")),
        role=flags["role"] or "default",
        max_restarts=launch.max_restarts,
        unset=find_unset_variables(os.environ),
        reports_progress=launch.hang_timeout is not None,
    )
    shown = launch.terminal_ranks
    start = ScriptStart(
        task,
        launch,
        Path(options.runs_dir or "runs"),
        options.name or make_run_name(options.script, time.localtime()),
        is_shown=lambda rank, local: (shown is None or rank in shown) and not hides(local),
        preload=preload,
    )
    with socket_folder():
        return start_script(start)


@dataclass(frozen=True, slots=True)
class ScriptSubmission:
    """A script to submit: its run, the ranks on each node, and the command without them."""

    name: str
    runs_dir: str
    devices: int | Literal["auto"]
    command: ScriptCommand


def prepare_script_submission(run_options: Sequence[str], script: Sequence[str]) -> ScriptSubmission:
    """Check options of `launcher run`, and a script or `-m` and a module with arguments, as a job gets them.

    Raises:
        LaunchError: an option is wrong, or is one that the job sets on its nodes.
    """
    from launcher.jobs.submission import ScriptCommand

    _check_run_options(run_options)
    options = build_parser().parse_args([*run_options, *script])
    check_name(options.name)
    flags = read_flags(options, {})
    read_hidden_ranks(flags)
    launch = read_launch_options({**flags, "terminal_ranks": flags["terminal_ranks"] or "all"})
    fixed = ("nnodes", "node_rank", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port", "rdzv_backend")
    problems = [Problem(f"--{name.replace('_', '-')}", "the job sets it on its nodes; use --nodes and leave it out")
                for name in fixed if flags[name] is not None]  # fmt: skip
    ranks = launch.nproc_per_node
    devices: int | Literal["auto"] = ranks if isinstance(ranks, int) else "auto"
    if isinstance(ranks, str):
        message = f"given {ranks}; expected a number here, or --gpus-per-node"
        problems.append(Problem("--nproc-per-node", message))
    if problems:
        raise LaunchError(problems)
    check_script(options.script, is_module=options.module, is_program=options.no_python)
    kept = remove_options(run_options, ("name", "runs-dir", "log-dir", "nproc-per-node"))
    name = options.name or make_run_name(options.script, time.localtime())
    command = ScriptCommand(tuple(kept), tuple(script))
    return ScriptSubmission(name, options.runs_dir or "runs", devices, command)


def _check_run_options(arguments: Sequence[str]) -> None:
    """Reject arguments of the script in front of `--`.

    Raises:
        LaunchError: contains what to write.
    """
    parser = build_parser()
    options, unknown = parser.parse_known_args(list(arguments))
    own = [*unknown, *filter(None, [options.script]), *options.arguments]
    if not own or find_advice(own[0].partition("=")[0].lstrip("-")):
        return  # correct, or explained by the parser
    first = next(index for index, each in enumerate(arguments) if each in own)
    example = shlex.join(hide_in_arguments(arguments[first:]))
    close = parser.find_close_option(own[0]) if own[0].startswith("-") else None
    hint = f"did you mean {close}? " if close else ""
    raise LaunchError(
        [Problem(own[0].partition("=")[0], f"{hint}write the script's arguments after --, as in -- {example}")]
    )


def check_name(name: str | None) -> None:
    """Reject a name under which the run would not be found.

    Raises:
        LaunchError: it is no name of a run.
    """
    from launcher.config.validation import find_name_problems

    if problems := [Problem("--name", text) for text in find_name_problems(name)]:
        raise LaunchError(problems)


def check_preload(modules: Sequence[str]) -> None:
    """Reject modules that do not exist; whether they import, shows in the ranks.

    Raises:
        LaunchError: lists them.
    """
    missing = [name for name in modules if not has_module(name.partition(":")[0].partition(".")[0])]
    if missing:
        message = f"given {', '.join(missing)}, which is not installed; give names of modules, or none"
        raise LaunchError([Problem("--preload", message)])


def remove_options(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments without these options and their values."""
    spellings = {spelling for name in names for spelling in (f"--{name}", f"--{name.replace('-', '_')}")}
    kept: list[str] = []
    skips = False
    for argument in arguments:
        if skips:
            skips = False
            continue
        skips = argument in spellings
        if not skips and argument.partition("=")[0] not in spellings:
            kept.append(argument)
    return kept


def make_run_name(script: str, now: time.struct_time) -> str:
    """Date, time and the script's name."""
    stem = Path(script.rstrip("/")).name.removesuffix(".py")
    return f"{time.strftime('%Y%m%d-%H%M%S', now)}-{_NAME.sub('-', stem).strip('-.') or 'script'}"


def read_preload(text: str | None) -> tuple[str, ...] | None:
    """The modules of `--preload`; empty for `none`, None if it was not given."""
    if text is None:
        return None
    return () if text == "none" else tuple(filter(None, (each.strip() for each in text.split(","))))


def find_search_path(path: Sequence[str], cwd: Path, program: str) -> list[str]:
    """Python's search path without the first entries, which are for the launcher's own start."""
    found = list(path)
    # `launcher.cli.main` adds the working directory, and so does `python -m`.
    if found and found[0] in ("", str(cwd)):
        del found[0]
    # Python adds the folder of the console script.
    if found and found[0] == str(Path(program).resolve().parent):
        del found[0]
    return found
