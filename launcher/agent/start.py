"""Starts the ranks of this node without torchrun: the fork server, then the agent, until the exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.agent.fork_server import ForkServer, StartMethod
from launcher.agent.start_request import StartRequest
from launcher.config.launch_options import LaunchOptions
from launcher.core.errors import LauncherError, TopologyError
from launcher.core.events import FILE_NAME, EventLog
from launcher.core.gc_paused import quick_imports
from launcher.process.kept_folder import create_kept_folder
from launcher.process.launch_time import mark_launch
from launcher.process.titles import set_title

# c10d looks up the name of every address that it connects to; by default a lost answer takes 5 s.
_RESOLVER_OPTIONS = "timeout:1 attempts:3"
_ELASTIC_LOGGER = "torch.distributed.elastic"


def start_ranks(request: StartRequest) -> int | None:
    """Start this node's ranks, wait for them, and restart them if that can help. Call it in the main thread.

    It can be called several times in a process: the environment and `multiprocessing`'s fork server are restored.

    Returns:
        The exit code; None if there is one rank, which this process can be itself.

    Raises:
        TopologyError: there are fewer devices than ranks, or the rendezvous failed.
    """
    likely = request.estimated_ranks
    before = dict(os.environ)
    mark_launch(os.environ)
    with contextlib.ExitStack() as stack:

        def start_server(ranks: int) -> ForkServer:
            _raise_descriptor_limit()
            os.environ.update(_rank_variables(request, ranks, os.environ))
            server = ForkServer()
            stack.callback(server.end)
            server.start(request.list_modules())
            return server

        # The server starts with a guess, because counting the devices imports torch.
        server = start_server(likely) if likely > 1 or request.has_agent else None
        count = request.count_ranks()
        is_single = count == 1 and not request.has_agent
        is_wrong_guess = _rank_variables(request, likely, before) != _rank_variables(request, count, before)
        if server is not None and (is_single or is_wrong_guess):
            # torch has read the number of threads in the server.
            server.end()
            server = None
            _restore_environment(before)
        if is_single:
            return None
        stack.callback(_restore_environment, before)
        return _run_agent(server or start_server(count), count, request)


def _restore_environment(before: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


def _rank_variables(request: StartRequest, ranks: int, env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that the fork server and the ranks need and the user has not set."""
    variables = {"RES_OPTIONS": _RESOLVER_OPTIONS, **request.make_variables(ranks)}
    return {name: value for name, value in variables.items() if name not in env}


def _raise_descriptor_limit() -> None:
    """Many ranks and loader workers need more open files than the common default of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A system may refuse its own hard limit.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run_agent(server: ForkServer, count: int, request: StartRequest) -> int:
    # torchelastic's handlers raise at any point of the code; AgentSignals replaces them. No process sends this one.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGURG"
    with quick_imports():
        from torch.distributed.elastic.rendezvous import (
            RendezvousClosedError,
            RendezvousConnectionError,
            RendezvousError,
        )

        from launcher.agent.agent import AgentFolders, TrainingAgent
        from launcher.agent.fixed_rendezvous import NodesMissingError
        from launcher.agent.rendezvous import FreshStoreRendezvous, describe_lost_store, make_rendezvous
        from launcher.agent.signals import AgentStopped
        from launcher.runs.continuation import Stop, describe_stop

    options = request.options
    set_title("agent", request.record_directory.name if request.record_directory else None)
    # The agent reports failures itself.
    logger = logging.getLogger(_ELASTIC_LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    rendezvous = make_rendezvous(options)
    if request.is_plain:
        rendezvous = FreshStoreRendezvous(rendezvous, options)

    def choose_start_method() -> StartMethod:
        return server.choose_start_method(lambda notice: sys.stderr.write(f"notice: {notice}\n"))

    try:
        folder = Path(tempfile.mkdtemp(prefix="launcher-"))
    except OSError as error:
        raise TopologyError(
            f"cannot create a temporary folder for the ranks' reports: {error}; set TMPDIR to a folder with free space"
        ) from error
    kept = create_kept_folder() if options.max_restarts > 0 and not request.is_plain else None
    agent: TrainingAgent | None = None
    try:
        agent = TrainingAgent(rendezvous, count, request, choose_start_method, AgentFolders(folder, kept))
        with agent.signals:
            result = agent.run()
        if result is None:
            raise LauncherError("another node ended the run; see the error on that node")
        return agent.exit_code
    except AgentStopped as stopped:
        if not request.is_plain:
            sys.stderr.write(f"{describe_stop(Stop(stopped.number))}\n")
        return 128 + stopped.number
    except RendezvousClosedError as error:
        raise LauncherError("another node ended the run; see the error on that node") from error
    except RendezvousConnectionError as error:
        if agent is None or not agent.has_started_ranks:
            raise _rendezvous_failed(options, error) from error
        raise LauncherError(describe_lost_store(options)) from error
    except NodesMissingError as error:
        _write_missing_nodes(request.record_directory, error.nodes)
        raise _rendezvous_failed(options, error) from error
    except RendezvousError as error:
        raise _rendezvous_failed(options, error) from error
    finally:
        if request.output is not None:
            request.output.end_attempt()
        rendezvous.shutdown()
        logger.setLevel(level)
        for each in (folder, kept):
            if each is not None:
                shutil.rmtree(each, ignore_errors=True)


def _write_missing_nodes(run: Path | None, nodes: Sequence[int]) -> None:
    """Write an event for `status` and for the SLURM job, which may be requeued, if the run directory exists."""
    if run is not None and run.is_dir():
        EventLog(run / FILE_NAME, rank=0).write("nodes_missing", nodes=list(nodes))


def _rendezvous_failed(options: LaunchOptions, error: Exception) -> TopologyError:
    return TopologyError(
        f"the rendezvous at {options.endpoint_host}:{options.endpoint_port} failed: {error}; check that node 0 runs "
        "and that as many nodes were started as --nnodes states"
    )
