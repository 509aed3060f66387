"""The command line: words to a command, errors to text and exit codes. Help needs no heavy import."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.job_parser import JOB_COMMANDS
from launcher.config.launch_options import LaunchOptions, add_launch_arguments, read_launch_options, reject_agent_flags
from launcher.core.distribution import __version__
from launcher.core.errors import ConfigError, Interrupted, LauncherError, TrainingError
from launcher.core.gc_paused import quick_imports
from launcher.core.secrets import hide_in_arguments, redact
from launcher.hardware.mpi_ranks import as_torchrun_variables, without_starters
from launcher.hardware.topology import Topology
from launcher.process.rank_status import RankStatusWriter

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

_EPILOG = """\
settings, each of them a key of the config file too:
  --model my_pkg.MyModule   --model.init_args.lr 1e-4   --data my_pkg.MyData
  --trainer.max_epochs 3    --precision bf16-mixed      --global_batch_size 256
  --name my-run             --resume auto|PATH|none     --wandb.mode offline
  all keys with their defaults: launcher fit --print-config

exit codes:
  0 done   1 training failed   2 usage or config   128+N stopped by signal N, after a checkpoint
"""
_COMMANDS = {
    "fit": "train (the default); with no config and no model, the built-in demo",
    "plan": "show what fit would choose, and why, without training",
    "validate": "evaluate a checkpoint of a run on its validation data",
    "test": "evaluate a checkpoint of a run on its test data",
    "predict": "write a run's predictions to its directory",
    **JOB_COMMANDS,
}
_EVALUATIONS = {
    "validate": "The metrics are printed, and go to the run's W&B run and its other loggers.",
    "test": "The metrics are printed, and go to the run's W&B run and its other loggers.",
    "predict": "Each rank writes predictions/rank-<r>.pt in the run's directory: torch.load() gives `predictions`, a "
    "list of\nwhat predict_step returned, and `batch_indices`, the numbers of the samples in each batch. A "
    "BasePredictionWriter\namong the callbacks writes instead. Nothing is printed.",
}
_OF_A_RUN = """

The run must be there: --name alone, or a --checkpoint in its folder, takes its config as well; with --config and no
name it is the newest run with that config. No run directory is made. A checkpoint of any strategy is taken, ZeRO's too;
the evaluation has the whole module on every rank. On several ranks each sample counts once; a warning tells where
Lightning has to repeat some."""
# Commands with options of their own: what they do, and the module whose `run` they are.
_TOOLS = {
    "init": ("write a config: asks for model, hardware, precision and logging", "launcher.wizard.command"),
    "convert": ("write a checkpoint of any strategy as one plain state dict", "launcher.cli.convert"),
    "doctor": ("look whether this machine and its cluster are sound", "launcher.doctor.command"),
    "report": ("write a page about a run, or compare two", "launcher.report.command"),
    "completion": ("print a script that lets bash, zsh or fish complete", "launcher.cli.completion"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command, or of the whole."""
    formatter = argparse.RawDescriptionHelpFormatter
    if command is None:
        texts = _COMMANDS | {name: text for name, (text, _) in _TOOLS.items()}
        listed = "\n".join(f"  {name:12}{text}" for name, text in texts.items())
        parser = argparse.ArgumentParser(
            "launcher",
            usage="launcher [COMMAND] [options] [--key value ...]",
            description="Train a PyTorch Lightning model on a laptop, under torchrun or on SLURM, from one config.\n\n"
            f"commands:\n{listed}\n\n`launcher COMMAND --help` tells more.",
            epilog=_EPILOG,
            formatter_class=formatter,
        )
        parser.add_argument("--version", action="version", version=f"launcher {__version__}")
        return parser
    parser = argparse.ArgumentParser(
        f"launcher {command}",
        usage=f"launcher {command} [options] [--key value ...]",
        description=_COMMANDS[command] + (f".\n{_EVALUATIONS[command]}{_OF_A_RUN}" if command in _EVALUATIONS else ""),
        epilog=f"{_EPILOG}\n{_list_strategies()}",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", action="append", default=[], metavar="FILE",
                        help="YAML or JSON; a later file overrides an earlier one")  # fmt: skip
    parser.add_argument("--print-config", "--print_config", action="store_true", help="print the whole config and end")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of usage errors too")
    if command in _EVALUATIONS:
        parser.add_argument("--checkpoint", default="best", metavar="best|last|PATH",
                            help="what to evaluate (default: best, by the run's ModelCheckpoint)")  # fmt: skip
    if command == "fit" or command in _EVALUATIONS:
        add_launch_arguments(parser)
    if command == "plan":
        from launcher.hardware.target_machines import add_options

        parser.add_argument("--json", action="store_true", help="the plan as JSON")
        add_options(parser)
    return parser


def _list_strategies() -> str:
    from strategies.registry import list_strategies

    rows = {
        "auto": "the fastest that fits the memory at hand",
        **{each.name: each.summary for each in list_strategies()},
    }
    return "strategies (--strategy NAME):\n" + "\n".join(f"  {name:33}{summary}" for name, summary in rows.items())


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code, as the help lists them.
    """
    words = list(arguments)
    if words and words[0] in _TOOLS:
        return _run_tool(_TOOLS[words[0]][1], words[1:])
    if words and words[0] in _COMMANDS:
        command = words.pop(0)
    elif words and not words[0].startswith("-"):
        return _unknown_command(words[0])
    else:
        if {"-h", "--help", "--version"} & set(words[:1]):
            build_parser().parse_args(words)
        command = "fit"
    if command in JOB_COMMANDS:
        from launcher.cli.job_commands import run_job_command

        return run_job_command(command, words)
    options, overrides = build_parser(command).parse_known_args(words)
    try:
        env = without_starters(os.environ) if getattr(options, "nnodes", None) else os.environ
        topology = Topology.from_env(env, socket.gethostname())
        # Lightning, DeepSpeed and the user's modules look there for the rank, too.
        os.environ.update(as_torchrun_variables(env))
        launch = LaunchOptions() if command == "plan" else read_launch_options(vars(options))
        config = _load(options, overrides, topology)
        if options.print_config:
            sys.stdout.write(config.to_yaml(os.environ))
            return 0
        if command == "plan":
            return _plan(config, topology, options)
        from launcher.process.socket_folder import socket_folder

        with socket_folder():
            code = _start_ranks(config, topology, launch, arguments)
            if code is not None:
                return code
            if command == "fit":
                return _fit(config, topology, launch)
            from launcher.training.evaluate import evaluate

            evaluate(config, command, options.checkpoint, terminal_ranks=launch.terminal_ranks)
            return 0
    except Interrupted as error:
        RankStatusWriter.from_env(os.environ).record_error(error)
        _say(f"stopped after step {error.step}; saved {error.checkpoint}" if error.checkpoint else str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted before the training began; nothing to save")
        return 130
    except TrainingError as error:
        # The traceback is in this rank's log already, and rank zero's on the terminal.
        if not RankStatusWriter.from_env(os.environ).has_agent:
            _say(f"error: {error}")
        _tell_agent(error)
        return error.exit_code
    except LauncherError as error:
        if options.debug:
            traceback.print_exc()
        # Every rank knows the error; rank zero tells it.
        told = RankStatusWriter.from_env(os.environ).has_agent
        if not told and (os.environ.get("RANK", "0") == "0" or type(error).__name__ == "TopologyError"):
            _say(f"error: {error}")
        _tell_agent(error)
        return error.exit_code


def _run_tool(module: str, words: Sequence[str]) -> int:
    """Run a command that has a parser of its own."""
    import importlib

    _import_from_here()
    try:
        return importlib.import_module(module).run(words)
    except (KeyboardInterrupt, EOFError):
        _say("\ncancelled; nothing was written")
        return 130
    except LauncherError as error:
        _say(f"error: {error}")
        return error.exit_code


def _tell_agent(error: LauncherError) -> None:
    """Let our agent's account, or torchrun's, say what went wrong, instead of only the exit code."""
    report = RankStatusWriter.from_env(os.environ)
    report.record_error(error)
    if report.has_agent:
        return
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)


def _start_ranks(config: RunConfig, topology: Topology, launch: LaunchOptions, arguments: Sequence[str]) -> int | None:
    """The exit code of this node's ranks; None if this process is a rank itself."""
    if topology.source == "torchrun":
        if not RankStatusWriter.from_env(os.environ).has_agent:
            reject_agent_flags(launch)
        return None
    from launcher.agent.rank_main import RankCommand
    from launcher.agent.slurm_allocation import enter_allocation, nodes_of_step
    from launcher.agent.start import start_ranks
    from launcher.hardware.rank_count import check_ranks

    enter_allocation(config, launch, arguments)
    with nodes_of_step(config, launch, os.environ) as launch:
        code = start_ranks(config, launch, RankCommand(run, tuple(arguments)))
    if code is None:
        check_ranks(config, topology)
    return code


def _fit(config: RunConfig, topology: Topology, launch: LaunchOptions) -> int:
    with quick_imports():
        import launcher.training.run  # noqa: F401 -- Lightning, which `fit` needs anyway
        from launcher.cli.summary import print_summary
        from launcher.training.fit import fit

    # The user's own loggers may write the command line down, as W&B's does.
    sys.argv = hide_in_arguments(sys.argv)
    result = fit(config, terminal_ranks=launch.terminal_ranks, stays_open=False)
    if topology.rank == 0:
        # The training is done, whether or not somebody still reads.
        with contextlib.suppress(OSError):
            print_summary(result)
    return 0


def _plan(config: RunConfig, topology: Topology, options: argparse.Namespace) -> int:
    from launcher.hardware.target_machines import read_options
    from launcher.planning.dry_run import plan_here

    found = plan_here(config, topology.host, read_options(options))
    if options.plot:
        from launcher.planning.plot import plot_memory

        plot_memory(found, config, Path(options.plot))
    if options.json:
        import json

        sys.stdout.write(json.dumps(redact(found.plan.to_dict()), indent=1) + "\n")
        return 0
    from launcher.core.terminal import make_console
    from launcher.planning.table import print_memory, print_plan

    console = make_console()
    print_plan(found.plan, console)
    print_memory(found.plan, console)
    return 0


def _load(options: argparse.Namespace, overrides: Sequence[str], topology: Topology) -> RunConfig:
    _import_from_here()
    from launcher.config.loading import load_config

    try:
        if not options.config and "checkpoint" in options:
            from launcher.training.evaluated_config import config_of_run

            options.config = config_of_run(options.checkpoint, overrides)
        return load_config(options.config, overrides)
    except ConfigError as error:
        if topology.world_size > 1:
            from launcher.training.fit import refuse_together

            refuse_together(topology, error)
        raise


def _import_from_here() -> None:
    """The current directory is importable, as it is for `python -m`."""
    here = str(Path.cwd())
    if sys.path[0] not in ("", here):
        sys.path.insert(0, here)


def _unknown_command(word: str) -> int:
    import difflib

    names = [*_COMMANDS, *_TOOLS]
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(names)}"
    _say(f"error: there is no command {word!r}; {hint}")
    return 2


def _say(text: str) -> None:
    # A terminal that is gone must not change the exit code.
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
