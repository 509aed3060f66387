"""Starting ranks where nobody else did: this node's agent, from the fork server to the exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.agent.fork_server import ForkServer, StartMethod
from launcher.agent.installed_imports import installed_imports
from launcher.agent.preload import USER_MODULES
from launcher.agent.worker import RankCommand
from launcher.config.launch_options import LaunchOptions
from launcher.config.schema import RunConfig
from launcher.core.errors import LauncherError, TopologyError
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.gc_paused import quick_imports
from launcher.hardware.cpus import usable_cpus
from launcher.hardware.rank_count import likely_ranks, requested_ranks
from strategies.registry import find_requested

# What every rank imports before it trains; all that is here is imported once, and its memory shared.
_LIBRARIES: tuple[str, ...] = ("torch", "torch.distributed", "lightning.pytorch", "torchdata.stateful_dataloader",
              "launcher.agent.worker", "launcher.training.fit", "launcher.hardware.devices",
              "launcher.hardware.rank_count",
              "launcher.user_code.classes", "launcher.config.loading", "launcher.config.validation",
              "launcher.checkpoint.resume",
              "launcher.training.run", "launcher.cli.summary", "docstring_parser",
              "torch.distributed.algorithms.ddp_comm_hooks.default_hooks")  # fmt: skip


def start_ranks(config: RunConfig, options: LaunchOptions, command: RankCommand) -> int | None:
    """Make this node's ranks, wait for them, restart them where that helps.

    Args:
        config: what to train.
        options: how many ranks and nodes, and when to restart.
        command: what every rank runs; it reads the command line again.

    Returns:
        The exit code; None if one rank is wanted, which this process can be itself.

    Raises:
        TopologyError: there are fewer devices than ranks, or the nodes cannot meet.
    """
    likely = likely_ranks(config, options)
    # One rank has an agent too where a failure may be followed by another start.
    several = options.several_nodes or options.max_restarts > 0 or config.on_oom == "next"
    with contextlib.ExitStack() as stack:

        def start_server(ranks: int) -> ForkServer:
            _raise_descriptor_limit()
            os.environ.update(_variables(config, ranks, os.environ))
            server = ForkServer()
            stack.callback(server.close)
            server.start(modules_to_preload(config, os.environ))
            return server

        before = dict(os.environ)
        server = start_server(likely) if likely > 1 or several else None
        count = requested_ranks(config, options)
        alone = count == 1 and not several
        guessed_wrong = _variables(config, likely, before) != _variables(config, count, before)
        if server is not None and (alone or guessed_wrong):
            # torch has read its number of threads there.
            server.end()
            server = None
            os.environ.clear()
            os.environ.update(before)
        if alone:
            return None
        return _run_agent(server or start_server(count), count, config, options, command)


def _variables(config: RunConfig, ranks: int, env: Mapping[str, str]) -> dict[str, str]:
    """What the fork server and the ranks must find in their environment beside what the user has set."""
    wanted = {
        # Read by torch and numpy when they are imported, so before the fork server begins.
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // ranks)),
        # c10d asks for the name of every address that it connects to; a lost answer costs the resolver 5 s by default.
        "RES_OPTIONS": "timeout:1 attempts:3",
    }
    if config.accelerator == "cpu":
        # DeepSpeed looks for its accelerator once, when it is imported.
        wanted["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in wanted.items() if name not in env}


def _raise_descriptor_limit() -> None:
    """Connections of many ranks and loader workers take more than the 1024 that many systems allow by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A system may refuse to go as far as its own limit says.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def modules_to_preload(config: RunConfig, env: Mapping[str, str]) -> list[str]:
    """What the ranks of this run will import and is installed: the libraries, a mark, what the user's files name.

    Args:
        config: what to train.
        env: the environment of the ranks.
    """
    libraries = list(_LIBRARIES)
    if config.wandb.mode != "disabled":
        libraries.append("wandb")
    # Without the variable a rank decides on DeepSpeed's accelerator, and then imports it.
    strategy = find_requested(config.strategy)
    if strategy is not None and (env.get("DS_ACCELERATOR") or not strategy.needs_deepspeed):
        libraries += strategy.libraries
    named = [config.model, config.data, dataclasses.asdict(config.trainer)]
    return [*libraries, USER_MODULES, *installed_imports(_class_paths(named))]


def _class_paths(value: Any) -> Iterator[str]:
    """Every `class_path` in nested settings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "class_path" and isinstance(inner, str):
                yield inner
            else:
                yield from _class_paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _class_paths(inner)


def _run_agent(server: ForkServer, count: int, config: RunConfig, options: LaunchOptions, command: RankCommand) -> int:
    # Its default handlers raise from anywhere; ours, set below, know whether ranks run.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    with quick_imports():
        from torch.distributed.elastic.rendezvous import (
            RendezvousClosedError,
            RendezvousConnectionError,
            RendezvousError,
        )

        from launcher.agent.agent import TrainingAgent
        from launcher.agent.fixed_rendezvous import NodesMissingError
        from launcher.agent.rendezvous import make_rendezvous
        from launcher.agent.restart_policy import host_lost
        from launcher.agent.signals import AgentStopped

    # Its account of a failure is written for its own people; the launcher gives one of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    rendezvous = make_rendezvous(options)

    def start_method() -> StartMethod:
        return server.start_method(lambda notice: sys.stderr.write(f"notice: {notice}\n"))

    try:
        folder = Path(tempfile.mkdtemp(prefix="launcher-"))
    except OSError as error:
        raise TopologyError(
            f"no temporary folder for the ranks' reports: {error}; set TMPDIR to one with space"
        ) from error
    agent: TrainingAgent | None = None
    try:
        agent = TrainingAgent(rendezvous, count, command, options, start_method, folder)
        with agent.signals:
            result = agent.run()
        if result is None:
            raise LauncherError("another node ended the run; its own account says why")
        return agent.exit_code
    except AgentStopped as stopped:
        return 128 + stopped.number
    except RendezvousClosedError as error:
        raise LauncherError("another node ended the run; its own account says why") from error
    except RendezvousConnectionError as error:
        if agent is None or not agent.has_met:
            raise _cannot_meet(options, error) from error
        raise LauncherError(host_lost(options.endpoint_host, options.endpoint_port)) from error
    except NodesMissingError as error:
        _note_missing(config, error.nodes)
        raise _cannot_meet(options, error) from error
    except RendezvousError as error:
        raise _cannot_meet(options, error) from error
    finally:
        rendezvous.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _note_missing(config: RunConfig, nodes: Sequence[int]) -> None:
    """For `status`, and for the SLURM job, which may be requeued: in the directory of a run that goes on."""
    if config.resume != "none" and config.name and (run := Path(config.runs_dir) / config.name).is_dir():
        EventLog(run / FILE_NAME, rank=0).write("nodes_missing", nodes=list(nodes))


def _cannot_meet(options: LaunchOptions, error: Exception) -> TopologyError:
    return TopologyError(
        f"the nodes cannot meet at {options.endpoint_host}:{options.endpoint_port}: {error}; look whether node 0 "
        "still runs, and whether as many nodes were started as --nnodes says"
    )
