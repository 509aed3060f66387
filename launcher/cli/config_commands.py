"""The subcommands that read a config and may run on every rank: `fit`, `plan`, `validate`, `test` and `predict`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.commands import COMMANDS, EVALUATIONS
from launcher.cli.keys import check_class_paths, check_positionals, command_keys
from launcher.cli.main import EPILOG, run
from launcher.cli.parsers import add_config, new_parser
from launcher.cli.settings import list_settings
from launcher.config.launch_options import LaunchOptions, add_launch_arguments, read_launch_options, reject_agent_flags
from launcher.config.synonyms import ADVICE
from launcher.core.command_parser import CommandParser
from launcher.core.errors import ConfigError, Problem
from launcher.core.gc_paused import quick_imports
from launcher.core.secrets import hide_in_arguments, redact
from launcher.hardware.mpi_ranks import remove_starter_variables, to_torchrun_variables
from launcher.hardware.topology import Topology
from launcher.process.interpreter_exit import flush_files
from launcher.process.rank_status import RankStatusWriter
from launcher.process.titles import prepare_titles

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.config.suggestions import CommandKeys

_METRICS = "The metrics are printed, and logged to the run's W&B run and its other\nloggers."
_PREDICTIONS = """\
Each rank writes predictions/rank-<r>.pt in the run's directory: torch.load()
gives `predictions`, a list of what predict_step returned, and `batch_indices`,
the numbers of the samples in each batch. A BasePredictionWriter among the
callbacks replaces this. Nothing is printed."""
_EXISTING_RUN = """

The run must exist: --name alone, or a --checkpoint in its folder, selects its
config as well; --config without a name selects the newest run with that config.
No run directory is created. A checkpoint of any strategy works, ZeRO's too; the
evaluation keeps the complete module on every rank. On several ranks each sample
counts once; a warning reports where Lightning has to repeat some."""


@dataclass(frozen=True, slots=True)
class ConfigCommand:
    """A subcommand with a config.

    Attributes:
        add_arguments: adds the command's own options.
        execute: runs it, in each rank if it starts ranks; returns the exit code.
        starts_ranks: whether this process starts the ranks, unless it is a rank.
        details: the help after the summary.
    """

    name: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[RunConfig, Topology, argparse.Namespace], int]
    starts_ranks: bool = True
    details: str = ""

    def build_parser(self) -> CommandParser:
        """The parser of the command's options."""
        usage = f"launcher {self.name} [options] [--key value ...]"
        description = COMMANDS[self.name].summary + self.details
        more = f"\n\n{list_settings()}" if self.name == "fit" else ""
        epilog = f"{EPILOG}\n{_list_strategies()}{more}"
        parser = new_parser(self.name, usage=usage, description=description, epilog=epilog)
        add_config(parser)
        parser.add_argument("--print-config", "--print_config", action="store_true",
                            help="print the complete config and exit")  # fmt: skip
        self.add_arguments(parser)
        return parser

    def run(self, arguments: Sequence[str]) -> int:
        """Read the config and run the command; returns the exit code."""
        parser = self.build_parser()
        options, overrides = parser.parse_known_args(list(arguments))
        keys = command_keys(parser, ADVICE[self.name])
        check_positionals(self.name, arguments, overrides, keys)
        prepare_titles()
        env = remove_starter_variables(os.environ) if getattr(options, "nnodes", None) else os.environ
        topology = Topology.from_env(env, socket.gethostname())
        # Lightning, DeepSpeed and the user's modules read the rank from these variables.
        os.environ.update(to_torchrun_variables(env))
        launch = read_launch_options(vars(options))
        options.terminal_ranks = launch.terminal_ranks
        config = self._load(options, overrides, topology, keys)
        if options.print_config:
            sys.stdout.write(config.to_yaml(os.environ))
            return 0
        if topology.world_size == 1:
            check_class_paths(config, keys)
        if topology.rank == 0 and not RankStatusWriter.from_env(os.environ).has_agent:
            from launcher.config.loading import find_notices

            sys.stderr.writelines(f"notice: {each}\n" for each in find_notices(options.config, overrides, keys))
        if launch.nproc_per_node is not None and config.devices != "auto":
            from launcher.config.loading import find_devices_source

            launch = dataclasses.replace(launch, devices_source=find_devices_source(options.config, overrides))
        # Before the user's code registers functions, which run first.
        atexit.register(flush_files)
        if not self.starts_ranks:
            return self.execute(config, topology, options)
        from launcher.process.socket_folder import socket_folder

        with socket_folder():
            code = _start_ranks(config, topology, launch, [self.name, *arguments])
            return self.execute(config, topology, options) if code is None else code

    def _load(
        self, options: argparse.Namespace, overrides: Sequence[str], topology: Topology, keys: CommandKeys
    ) -> RunConfig:
        from launcher.config.loading import load_config

        try:
            if not options.config and self.name in EVALUATIONS:
                from launcher.training.evaluated_run import find_run_config

                options.config = find_run_config(options.checkpoint, overrides)
            config = load_config(options.config, overrides, keys)
            if self.name in EVALUATIONS:
                self._check_data(config)
            return config
        except ConfigError as error:
            if topology.world_size > 1:
                from launcher.training.decision import refuse_together

                refuse_together(topology, error)
            raise

    def _check_data(self, config: RunConfig) -> None:
        """Reject the demo, which is the default and has only data to train and to validate."""
        from launcher.config.loading import read_preset

        data = (config.data or {}).get("class_path")
        if self.name != "validate" and data == read_preset("demo")["data"]["class_path"]:
            raise ConfigError(
                [Problem("data", f"the built-in demo has none for {self.name}; give a run of your own model, as in "
                         f"launcher {self.name} --name NAME, or its config with --config; `launcher status` lists the "
                         "runs")]
            )  # fmt: skip


def _list_strategies() -> str:
    from strategies.registry import list_strategies

    rows = {"auto": "the fastest that fits the memory", **{each.name: each.summary for each in list_strategies()}}
    wide = "\n" + " " * 21
    # A long name has its summary on the next line.
    lines = (
        f"  {name:19}{summary}" if len(name) < 19 else f"  {name}{wide}{summary}" for name, summary in rows.items()
    )
    return "strategies (--strategy NAME):\n" + "\n".join(lines)


def _start_ranks(config: RunConfig, topology: Topology, launch: LaunchOptions, arguments: Sequence[str]) -> int | None:
    """Start this node's ranks and return their exit code; None if this process is a rank itself."""
    if topology.source == "torchrun":
        if not RankStatusWriter.from_env(os.environ).has_agent:
            reject_agent_flags(launch)
        return None
    from launcher.agent.config_start import make_start_request
    from launcher.agent.rank_main import RankCommand
    from launcher.agent.slurm_allocation import enter_allocation, nodes_of_step
    from launcher.agent.start import start_ranks
    from launcher.hardware.rank_count import check_ranks

    enter_allocation(config, launch, arguments)
    with nodes_of_step(config, launch, os.environ) as launch:
        code = start_ranks(make_start_request(config, launch, RankCommand(run, tuple(arguments))))
    if code is None:
        check_ranks(config, topology)
    return code


def _fit(config: RunConfig, topology: Topology, options: argparse.Namespace) -> int:
    with quick_imports():
        import launcher.training.run  # noqa: F401 -- Lightning, which `fit` needs anyway
        from launcher.cli.summary import print_summary
        from launcher.training.fit import fit

    # The user's loggers may record the command line, as W&B's does.
    sys.argv = hide_in_arguments(sys.argv)
    result = fit(config, terminal_ranks=options.terminal_ranks, stays_open=False)
    if topology.rank == 0:
        # The training is complete even if the terminal is closed.
        with contextlib.suppress(OSError):
            print_summary(result)
    return 0


def _evaluation(name: str, output: str) -> ConfigCommand:
    """The command `name`, which evaluates a checkpoint; `output` describes its results."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--checkpoint", default="best", metavar="best|last|PATH",
                            help="what to evaluate (default: best, by the run's ModelCheckpoint)")  # fmt: skip
        parser.add_argument("--ckpt-path", "--ckpt_path", dest="checkpoint", default=argparse.SUPPRESS, metavar="PATH",
                            help="the same; its name in LightningCLI")  # fmt: skip
        add_launch_arguments(parser)

    def execute(config: RunConfig, topology: Topology, options: argparse.Namespace) -> int:
        del topology
        from launcher.training.evaluate import evaluate

        evaluate(config, name, options.checkpoint, terminal_ranks=options.terminal_ranks)
        return 0

    details = f".\n{output}{_EXISTING_RUN}"
    return ConfigCommand(name, add_arguments, execute, details=details)


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    from launcher.hardware.target_machines import add_options

    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    add_options(parser)


def _plan(config: RunConfig, topology: Topology, options: argparse.Namespace) -> int:
    from launcher.hardware.target_machines import read_options
    from launcher.planning.spinner import find_terminal, show_activity
    from launcher.process.activity import doing

    machines = read_options(options)
    with show_activity(None if options.json else find_terminal()):
        with doing("importing torch and Lightning"):
            from launcher.planning.dry_run import plan_here

        found = plan_here(config, topology.host, machines)
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
    if options.plot:
        console.print(f"plot: {Path(options.plot).absolute()}", highlight=False, markup=False, soft_wrap=True)
    return 0


FIT = ConfigCommand("fit", add_launch_arguments, _fit)
PLAN = ConfigCommand("plan", _add_plan_arguments, _plan, starts_ranks=False)
VALIDATE = _evaluation("validate", _METRICS)
TEST = _evaluation("test", _METRICS)
PREDICT = _evaluation("predict", _PREDICTIONS)
