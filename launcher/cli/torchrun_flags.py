"""torchrun's flags as `launcher run` reads them. Flags that the launcher does differently are explained errors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher.config.synonyms import ADVICE
from launcher.core.errors import LaunchError, Problem

# Flags with a value that are passed on to `read_launch_options`.
_LAUNCH_FLAGS: Mapping[str, tuple[str, str]] = {
    "nproc-per-node": ("N", "ranks on each node: a number, gpu, cpu or auto (default 1)"),
    "nnodes": ("N|MIN:MAX", "number of nodes, or the range of an elastic run"),
    "node-rank": ("N", "this node's number; node 0 serves the rendezvous"),
    "rdzv-endpoint": ("HOST:PORT", "address of the rendezvous"),
    "rdzv-id": ("NAME", "name of this run's rendezvous (default: launcher)"),
    "rdzv-conf": ("K=V,...", "join_timeout and last_call_timeout, in seconds"),
    "max-restarts": ("N", "most restarts after failures within the window (default 0)"),
    "restart-window": ("SECONDS", "length of the window; older restarts do not count (default 3600)"),
    "hang-timeout": ("SECONDS", "time in which no rank enters a collective that counts as a hang (default: no limit)"),
    "terminal-ranks": ("0,1|all|none", "ranks whose output is shown (default all)"),
}
# Flags with a value that this module reads.
_OWN_FLAGS: Mapping[str, tuple[str, str]] = {
    "master-addr": ("HOST", "host of node 0; with --master-port the same as --rdzv-endpoint HOST:PORT"),
    "master-port": ("PORT", "port on node 0 (default 29500)"),
    "rdzv-backend": ("NAME", "c10d or static; both use the launcher's rendezvous"),
    "local-ranks-filter": ("0,1", "ranks of each node whose output is shown (default all)"),
    "role": ("NAME", "ROLE_NAME in the ranks' environment"),
    "redirects": ("STREAMS", "3 shows no output, 0:3,1:3 hides these local ranks; log files contain all output"),
    "tee": ("STREAMS", "no effect: all output is shown and in log files"),
    "monitor-interval": ("SECONDS", "no effect: the agent notices the end of a rank at once"),
    "start-method": ("NAME", "no effect: a fork server starts the ranks"),
    "signals-to-handle": ("NAMES", "no effect: INT, TERM, HUP, USR1 and USR2 are forwarded, as INT or TERM"),
}
_SWITCHES: Mapping[str, str] = {
    "standalone": "one node with a free port: the default",
    "no-python": "SCRIPT is a program; it is started without Python",
    "run-path": "no effect: the script always runs in a process that has imported torch",
}
# torchrun's other flags, by their name with dashes, with what to do instead.
_REFUSED = {name.replace("_", "-"): advice for name, advice in ADVICE["torchrun"].items()}
_REFUSED_SWITCHES = frozenset({"virtual-local-rank"})
_SHORT = {"redirects": "-r", "tee": "-t"}
_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
_MASTER_PORT = 29500


def add_torchrun_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of torchrun in both of its spellings; torchrun reads their defaults from PET_ variables."""
    ranks = parser.add_argument_group("ranks")
    for name, (metavar, text) in _LAUNCH_FLAGS.items():
        ranks.add_argument(*_spellings(name), dest=_key(name), metavar=metavar, help=text)
    others = parser.add_argument_group("torchrun's other flags")
    for name, (metavar, text) in _OWN_FLAGS.items():
        others.add_argument(*_spellings(name), dest=_key(name), metavar=metavar, help=text)
    for name, text in _SWITCHES.items():
        others.add_argument(*_spellings(name), dest=_key(name), action="store_true", help=text)
    for name in _REFUSED:
        nargs = 0 if name in _REFUSED_SWITCHES else None
        parser.add_argument(*_spellings(name), dest=argparse.SUPPRESS, nargs=nargs, action=_Refuse,
                            help=argparse.SUPPRESS)  # fmt: skip


class _Refuse(argparse.Action):
    """Explains a flag that is not supported."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        del parser, namespace, values
        name = (option or "").lstrip("-").replace("_", "-")
        full = next((each for each in _REFUSED if each.startswith(name)), name)
        raise LaunchError([Problem(f"--{full}", _REFUSED[full])])


def read_flags(options: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """The values for `read_launch_options`, with torchrun's defaults from `PET_` variables in the environment.

    Raises:
        LaunchError: lists the flags that contradict each other or have a wrong value.
    """
    given = {_key(name): _value(options, name, env) for name in (*_LAUNCH_FLAGS, *_OWN_FLAGS)}
    problems: list[Problem] = []
    if given["rdzv_backend"] not in (None, "c10d", "static"):
        message = f"given {given['rdzv_backend']!r}; expected c10d or static: the launcher has its own rendezvous"
        problems.append(Problem("--rdzv-backend", message))
    if _has_switch(options, "standalone", env):
        # As in torchrun: the other flags of the rendezvous have no effect.
        given |= dict.fromkeys(("nnodes", "node_rank", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port"))
    if given["rdzv_endpoint"] is None and (given["master_addr"] or given["master_port"]):
        given["rdzv_endpoint"] = f"{given['master_addr'] or '127.0.0.1'}:{given['master_port'] or _MASTER_PORT}"
    for name in ("redirects", "tee"):
        text = given[name]
        if text is not None and not _STREAMS.fullmatch(text):
            problems.append(Problem(f"--{name}", f"given {text!r}; expected 0 to 3, or RANK:STREAMS as in 0:3,1:3"))
    if problems:
        raise LaunchError(problems)
    return given


def read_hidden_ranks(given: Mapping[str, Any]) -> Callable[[int], bool]:
    """A function that returns whether the output of a local rank is hidden.

    Raises:
        LaunchError: a filter has a wrong value, or hides only one stream of a rank.
    """
    shown: frozenset[int] | None = None
    if given["local_ranks_filter"]:
        try:
            shown = frozenset(int(each) for each in given["local_ranks_filter"].split(","))
        except ValueError:
            message = f"given {given['local_ranks_filter']!r}; expected local ranks, as in 0,2"
            raise LaunchError([Problem("--local-ranks-filter", message)]) from None
        count = given["nproc_per_node"] or ""
        if count.isdecimal() and max(shown) >= int(count) > 0:
            message = f"given {max(shown)}; expected less than --nproc-per-node, which is {count}"
            raise LaunchError([Problem("--local-ranks-filter", message)])
    streams = given["redirects"] or "0"
    by_rank = {each.rpartition(":")[0]: each.rpartition(":")[2] for each in streams.split(",")}
    if {"1", "2"} & set(by_rank.values()):
        message = f"given {streams!r}; expected 3 or 0: the launcher hides both streams of a rank or none"
        raise LaunchError([Problem("--redirects", message)])
    hidden = {rank for rank, stream in by_rank.items() if stream == "3"}
    return lambda rank: (shown is not None and rank not in shown) or "" in hidden or str(rank) in hidden


def _value(options: argparse.Namespace, name: str, env: Mapping[str, str]) -> str | None:
    given: str | None = getattr(options, _key(name))
    return env.get(f"PET_{_key(name).upper()}") if given is None else given


def _has_switch(options: argparse.Namespace, name: str, env: Mapping[str, str]) -> bool:
    return getattr(options, _key(name)) or env.get(f"PET_{_key(name).upper()}", "0") not in ("", "0")


def _key(name: str) -> str:
    return name.replace("-", "_")


def _spellings(name: str) -> list[str]:
    short = [_SHORT[name]] if name in _SHORT else []
    return [*short, *dict.fromkeys((f"--{name}", f"--{_key(name)}"))]
