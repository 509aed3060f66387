"""The flags that set how ranks are started, with torchrun's names, in one frozen record. Pure."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from launcher.core.errors import LaunchError, Problem

# Seconds in which `--max-restarts` restarts are allowed; older ones do not count.
DEFAULT_RESTART_WINDOW = 3600.0
_DEFAULT_PORT = 29400
_RENDEZVOUS_SETTINGS = ("join_timeout", "last_call_timeout")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How the ranks are started and restarted.

    Attributes:
        nproc_per_node: ranks on each node, 'gpu', 'cpu' or 'auto'; None if not given.
        node_rank: this node's number, 0 to `max_nodes - 1`; None lets the rendezvous decide.
        endpoint_host: host of the rendezvous; node 0 serves it.
        endpoint_port: its port; 0 lets the system choose, on a single node.
        run_id: name of the rendezvous; None for a generated one, on a single node.
        join_timeout: seconds that a node waits for the others.
        last_call: seconds that an elastic start waits for more nodes after `min_nodes` have joined.
        max_restarts: restarts within `restart_window` seconds before the agent gives up.
        hang_timeout: seconds without a step after which the run counts as hung; None: from the observed step time.
        devices_source: where the config's `devices` was given, for messages.
        terminal_ranks: ranks whose output is shown on the terminal; None means all.
    """

    nproc_per_node: int | str | None = None
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int | None = None
    endpoint_host: str = "127.0.0.1"
    endpoint_port: int = 0
    run_id: str | None = None
    join_timeout: float = 600.0
    last_call: float = 5.0
    max_restarts: int = 0
    restart_window: float = DEFAULT_RESTART_WINDOW
    hang_timeout: float | None = None
    devices_source: str = "devices"
    terminal_ranks: frozenset[int] | None = frozenset({0})

    @property
    def several_nodes(self) -> bool:
        """Whether other nodes may take part."""
        return self.max_nodes > 1


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags with torchrun's names, in both of its spellings."""
    group = parser.add_argument_group("ranks (without torchrun)")

    def flag(name: str, metavar: str, help_text: str) -> None:
        spellings = {f"--{name}", f"--{name.replace('-', '_')}"}
        group.add_argument(*sorted(spellings), dest=name.replace("-", "_"), metavar=metavar, help=help_text)

    flag("nproc-per-node", "N", "ranks on each node: a number, gpu, cpu or auto")
    flag("nnodes", "N|MIN:MAX", "number of nodes, or the range of an elastic run")
    flag("node-rank", "N", "this node's number; node 0 serves the rendezvous")
    flag("rdzv-endpoint", "HOST:PORT", "address of the rendezvous")
    flag("rdzv-id", "NAME", "name of this run's rendezvous (default: launcher)")
    flag("rdzv-conf", "K=V,...", "join_timeout and last_call_timeout, in seconds")
    flag("max-restarts", "N", "most restarts after failures within the window (default 0)")
    flag("restart-window", "SECONDS", "length of the window; older restarts do not count (default 3600)")
    flag("hang-timeout", "SECONDS", "time without a step that counts as a hang (default: 20 step times, at least 600)")
    flag("terminal-ranks", "0,1|all|none", "ranks whose output is shown (default 0); log files contain all ranks")


def read_launch_options(given: Mapping[str, Any]) -> LaunchOptions:
    """Read the flags: name with underscores to text, or to None if it was not given.

    Raises:
        LaunchError: lists every flag that is wrong.
    """
    reader = _Reader({key: value for key, value in given.items() if value is not None})
    count, seconds = "a whole number of at least 0", "seconds, more than 0"
    smallest, largest = reader.read("nnodes", (1, 1), _node_counts, "N or MIN:MAX, as in 2 or 1:4")
    node_rank = reader.read("node_rank", 0, _whole_number, count)
    host, port = reader.read("rdzv_endpoint", ("127.0.0.1", 0), _endpoint, "HOST:PORT, as in node0:29400")
    conf = reader.rendezvous_settings()
    options = LaunchOptions(
        nproc_per_node=reader.read("nproc_per_node", None, _ranks_per_node, "a number of at least 1, gpu, cpu or auto"),
        min_nodes=smallest,
        max_nodes=largest,
        node_rank=node_rank if "node_rank" in reader.given else None,
        endpoint_host=host,
        endpoint_port=port,
        run_id=reader.given.get("rdzv_id"),
        join_timeout=conf.get("join_timeout", 600.0),
        last_call=conf.get("last_call_timeout", 5.0),
        max_restarts=reader.read("max_restarts", 0, _whole_number, count),
        restart_window=reader.read("restart_window", DEFAULT_RESTART_WINDOW, _seconds, seconds),
        hang_timeout=reader.read("hang_timeout", None, _seconds, seconds),
        terminal_ranks=reader.read("terminal_ranks", frozenset({0}), _ranks, "ranks as in 0,3, or all, or none"),
    )
    if largest > 1 and "rdzv_endpoint" not in reader.given:
        reader.add_problem("rdzv-endpoint", f"not given, but required for {largest} nodes; give HOST:PORT of node 0")
    if node_rank >= largest:
        reader.add_problem("node-rank", f"given {node_rank}; expected 0 to {largest - 1} with --nnodes {largest}")
    shown, ranks = options.terminal_ranks, options.nproc_per_node
    if shown and isinstance(ranks, int) and max(shown) >= ranks * largest:
        last = ranks * largest - 1
        reader.add_problem("terminal-ranks", f"given {max(shown)}; expected ranks 0 to {last}" if last else
                           f"given {max(shown)}; there is only rank 0")  # fmt: skip
    if reader.problems:
        raise LaunchError(reader.problems)
    return options


def reject_agent_flags(options: LaunchOptions) -> None:
    """Reject the flags of the launcher's agent under torchrun, which has its own.

    Raises:
        LaunchError: lists the given flags.
    """
    plain = LaunchOptions()
    flags = {"nproc-per-node": "nproc_per_node", "nnodes": "max_nodes", "node-rank": "node_rank", "rdzv-id": "run_id",
             "rdzv-endpoint": "endpoint_host", "max-restarts": "max_restarts", "restart-window": "restart_window",
             "hang-timeout": "hang_timeout"}  # fmt: skip
    given = [flag for flag, name in flags.items() if getattr(options, name) != getattr(plain, name)]
    if given:
        message = "not valid under torchrun; give it to torchrun if it has this flag, or start without torchrun"
        raise LaunchError([Problem(f"--{flag}", message) for flag in given])


class _Reader:
    """Reads the flags' texts and collects the problems."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = given
        self.problems: list[Problem] = []

    def add_problem(self, flag: str, message: str) -> None:
        self.problems.append(Problem(f"--{flag}", message))

    def read(self, name: str, default: _Value, parse: Callable[[str], _Value], expected: str) -> _Value:
        """A flag's value; the default if it was not given, or if `parse` raises a ValueError, which is a problem."""
        text = self.given.get(name)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError:
            self.add_problem(name.replace("_", "-"), f"given {text!r}; expected {expected}")
            return default

    def rendezvous_settings(self) -> dict[str, float]:
        """The settings of `--rdzv-conf`; each wrong one is a problem."""
        values: dict[str, float] = {}
        for part in filter(None, self.given.get("rdzv_conf", "").split(",")):
            try:
                key, seconds = _rendezvous_setting(part)
                values[key] = seconds
            except ValueError:
                expected = " or ".join(f"{known}=SECONDS" for known in _RENDEZVOUS_SETTINGS)
                self.add_problem("rdzv-conf", f"given {part!r}; expected {expected}")
        return values


def _whole_number(text: str, minimum: int = 0) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise ValueError(text)
    return int(text)


def _seconds(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return float(text)


def _rendezvous_setting(text: str) -> tuple[str, float]:
    key, _, seconds = text.partition("=")
    if key not in _RENDEZVOUS_SETTINGS:
        raise ValueError(text)
    return key, _seconds(seconds)


def _ranks_per_node(text: str) -> int | str:
    return text if text in ("gpu", "cpu", "auto") else _whole_number(text, minimum=1)


def _node_counts(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    smallest = _whole_number(low, minimum=1)
    return smallest, _whole_number(high or low, minimum=smallest)


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):  # an IPv6 address without a port
        host, port = text, str(_DEFAULT_PORT)
    if not host or _whole_number(port) > 65535:
        raise ValueError(text)
    return host.strip("[]"), int(port)


def _ranks(text: str) -> frozenset[int] | None:
    if text == "all":
        return None
    return frozenset() if text == "none" else frozenset(map(_whole_number, text.split(",")))
