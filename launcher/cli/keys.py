"""What a command accepts in addition to the settings, and what other tools call it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.cli.main import CONFIG_FILES, format_command, is_script
from launcher.core.command_parser import CommandParser
from launcher.core.errors import CommandLineError, ConfigError
from launcher.core.gc_paused import quick_imports
from slurm.job import list_job_options

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.config.suggestions import ClassFindings, CommandKeys

# Names that torchrun, accelerate, DeepSpeed and mpirun have for options of `fit`.
LAUNCH_SYNONYMS: Mapping[str, str] = {
    **dict.fromkeys(("num_processes", "nproc", "np", "n"), "--nproc-per-node"),
    **dict.fromkeys(("num_machines", "n_nodes", "nodes"), "--nnodes"),
    "machine_rank": "--node-rank",
    **dict.fromkeys(("main_process_ip", "master_addr"), "--rdzv-endpoint"),
    **dict.fromkeys(("main_process_port", "master_port"), "give the port in --rdzv-endpoint HOST:PORT"),
    "rdzv_timeout": "give it in --rdzv-conf join_timeout=SECONDS",
    "monitor_interval": "the agent learns of a failure at once; remove it",
    "hostfile": "start the same command on each node, with --nnodes and --rdzv-endpoint HOST:PORT",
    **dict.fromkeys(
        ("tee", "redirects", "t", "r"), "log files contain all ranks; write --terminal-ranks all to see them"
    ),
    "local_ranks_filter": "--terminal-ranks",
}
_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\.[A-Z]\w*")
_RANKS_OF_NODE = ("nproc_per_node", "ntasks_per_node", "tasks_per_node", "num_processes", "nproc", "procs", "np")
_LOGS = "each rank has a log in the run directory; remove it, and read one with `launcher logs RUN`"
# Names that sbatch, submitit and torchrun have for options of `submit`.
SUBMIT_SYNONYMS: Mapping[str, str] = {
    **{f"slurm_{name.replace('-', '_')}": f"--{name}" for name in list_job_options()},
    **dict.fromkeys(_RANKS_OF_NODE, "--devices"),
    **dict.fromkeys(("gpus", "num_gpus", "G", "gpus_per_task"), "--gpus-per-node"),
    **dict.fromkeys(("nnodes", "num_machines", "n_nodes"), "--nodes"),
    **dict.fromkeys(("ntasks", "n"), "one task on each node starts its ranks; give --nodes N and --devices N"),
    "gres": "give the number of GPUs with --gpus-per-node N",
    **dict.fromkeys(("job_name", "J"), "--name"),
    **dict.fromkeys(("timeout_min", "time_limit", "walltime", "slurm_timeout_min"), "--time"),
    **dict.fromkeys(("mem_gb", "memory"), "--mem"),
    **dict.fromkeys(("queue", "slurm_queue"), "--partition"),
    **dict.fromkeys(("output", "error", "o", "e", "log_dir"), _LOGS),
    "export": "--export-env",
    "cpus": "--cpus-per-task",
    "w": "--nodelist",
    "C": "--constraint",
    "x": "--exclude",
    "d": "--dependency",
    "a": "--array",
    "requeue": "jobs are queued again without it; remove it",
    "wait": "submit does not wait; remove it, and use `launcher status RUN --watch`",
    **dict.fromkeys(("wrap", "chdir"), "the job trains from the current folder; remove it"),
    "exclusive": "not supported; remove it, or request all cores with --cpus-per-task N",
}


def command_keys(parser: CommandParser, synonyms: Mapping[str, str] | None = None) -> CommandKeys:
    """The options of a parser, with the names that other tools have for them."""
    from launcher.config.suggestions import CommandKeys

    options = parser.list_options()
    # An option with two spellings is suggested with dashes.
    own = dict.fromkeys(dashed if (dashed := text.replace("_", "-")) in options else text for text in options)
    return CommandKeys(tuple(own), synonyms or {}, _inspect)


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
            command = format_command(*(_submit_script(given, arguments) if name == "submit" else ("run", *arguments)))
            raise CommandLineError(f"{what} is not started like this; write:\n  {command}")


def _with_option(option: str, values: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The arguments with an option before each of the values that has none."""
    corrected: list[str] = []
    for previous, given in itertools.pairwise(["", *arguments]):
        has_option = previous in (option, "-c")
        corrected += [option, given] if given in values and not has_option else [given]
    return corrected


def _submit_script(script: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of `submit` with the option for a script, whose own arguments follow `--`."""
    position = list(arguments).index(script)
    after = arguments[position + 1 :]
    return ["submit", *arguments[:position], "--script", script, *(["--", *after] if after else [])]
