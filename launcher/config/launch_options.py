"""The flags that set how ranks are started, named as torchrun's, in one frozen record. Pure."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.core.errors import LaunchError, Problem

# Seconds in which `--max-restarts` restarts are allowed; older ones do not count.
DEFAULT_RESTART_WINDOW = 3600.0
_DEFAULT_PORT = 29400


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """How the ranks are started and restarted.

    Attributes:
        nproc_per_node: ranks on each node, 'gpu', 'cpu' or 'auto'; None if not given.
        min_nodes: fewest nodes.
        max_nodes: most nodes.
        node_rank: this node's number, 0 to `max_nodes - 1`; None lets the rendezvous decide.
        endpoint_host: host of the rendezvous; node 0 serves it.
        endpoint_port: its port; 0 lets the system choose, on a single node.
        run_id: the name of the rendezvous; None for a generated one, on a single node.
        join_timeout: seconds that a node waits for the others.
        last_call: seconds that an elastic start waits for more nodes after `min_nodes` have joined.
        max_restarts: restarts within `restart_window` before the agent gives up.
        restart_window: seconds.
        hang_timeout: seconds without a step after which the run counts as hung; None: from the observed step time.
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
    """Read the flags.

    Args:
        given: flag name, with underscores, to text; None or missing if it was not given.

    Raises:
        LaunchError: lists every flag that is wrong.
    """
    reader = _Reader({key: value for key, value in given.items() if value is not None})
    smallest, largest = reader.node_counts()
    node_rank = reader.number("node_rank", 0, minimum=0)
    host, port = reader.endpoint()
    conf = reader.settings("rdzv_conf", ("join_timeout", "last_call_timeout"))
    options = LaunchOptions(
        nproc_per_node=reader.ranks_per_node(),
        min_nodes=smallest,
        max_nodes=largest,
        node_rank=node_rank if "node_rank" in reader.given else None,
        endpoint_host=host,
        endpoint_port=port,
        run_id=reader.given.get("rdzv_id"),
        join_timeout=conf.get("join_timeout", 600.0),
        last_call=conf.get("last_call_timeout", 5.0),
        max_restarts=reader.number("max_restarts", 0, minimum=0),
        restart_window=reader.seconds("restart_window", DEFAULT_RESTART_WINDOW),
        hang_timeout=reader.seconds("hang_timeout", None),
        terminal_ranks=reader.ranks("terminal_ranks"),
    )
    if largest > 1 and "rdzv_endpoint" not in reader.given:
        reader.add_problem("rdzv-endpoint", f"not given, but required for {largest} nodes; give HOST:PORT of node 0")
    if node_rank >= largest:
        reader.add_problem("node-rank", f"given {node_rank}; expected 0 to {largest - 1} with --nnodes {largest}")
    if reader.problems:
        raise LaunchError(reader.problems)
    return options


def reject_agent_flags(options: LaunchOptions) -> None:
    """Under torchrun there is no agent of the launcher: reject its flags instead of ignoring them.

    Raises:
        LaunchError: names the flags that were given.
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

    def number(self, name: str, default: int, *, minimum: int) -> int:
        text = self.given.get(name)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < minimum:
            self.add_problem(name.replace("_", "-"), f"given {text!r}; expected a whole number of at least {minimum}")
            return default
        return int(text)

    def seconds(self, name: str, default: Any) -> Any:
        text = self.given.get(name)
        if text is None:
            return default
        value = _positive(text)
        if value is None:
            self.add_problem(name.replace("_", "-"), f"given {text!r}; expected seconds, more than 0")
            return default
        return value

    def ranks_per_node(self) -> int | str | None:
        text = self.given.get("nproc_per_node")
        if text is None or text in ("gpu", "cpu", "auto"):
            return text
        if not text.isdecimal() or int(text) < 1:
            self.add_problem("nproc-per-node", f"given {text!r}; expected a number of at least 1, gpu, cpu or auto")
            return None
        return int(text)

    def node_counts(self) -> tuple[int, int]:
        text = self.given.get("nnodes", "1")
        low, _, high = text.partition(":")
        high = high or low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
            self.add_problem("nnodes", f"given {text!r}; expected N or MIN:MAX, as in 2 or 1:4")
            return 1, 1
        return int(low), int(high)

    def endpoint(self) -> tuple[str, int]:
        text = self.given.get("rdzv_endpoint")
        if text is None:
            return "127.0.0.1", 0
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):  # an IPv6 address without a port
            host, port = text, str(_DEFAULT_PORT)
        if not host or not port.isdecimal() or not int(port) <= 65535:
            self.add_problem("rdzv-endpoint", f"given {text!r}; expected HOST:PORT, as in node0:29400")
            return "127.0.0.1", 0
        return host.strip("[]"), int(port)

    def settings(self, name: str, known: Collection[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        for part in filter(None, self.given.get(name, "").split(",")):
            key, _, text = part.partition("=")
            value = _positive(text)
            if key not in known or value is None:
                expected = " or ".join(f"{k}=SECONDS" for k in known)
                self.add_problem(name.replace("_", "-"), f"given {part!r}; expected {expected}")
            else:
                values[key] = value
        return values

    def ranks(self, name: str) -> frozenset[int] | None:
        text = self.given.get(name, "0")
        if text == "all":
            return None
        if text == "none":
            return frozenset()
        parts = text.split(",")
        if not all(part.isdecimal() for part in parts):
            self.add_problem(name.replace("_", "-"), f"given {text!r}; expected ranks as in 0,3, or all, or none")
            return frozenset({0})
        return frozenset(map(int, parts))


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
