"""Settings of FSDP2 that no strategy reads, or that do not fit the number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.schema import FsdpOptions
from launcher.core.errors import Problem
from strategies.base import StrategyEntry
from strategies.fsdp import HSDP, FullyShard

_DEFAULTS = dataclasses.asdict(FsdpOptions())


def find_fsdp_contradictions(values: Mapping[str, Any], strategy: StrategyEntry | None) -> Iterator[Problem]:
    """Problems of `fsdp` with the other settings.

    `strategy` is the requested one; None for `auto`, which may choose FSDP2.
    """
    group = values.get("fsdp")
    given = {key: value for key, value in group.items() if key in _DEFAULTS and value != _DEFAULTS[key]} if (
        isinstance(group, Mapping)) else {}  # fmt: skip
    if strategy is not None and not isinstance(strategy, FullyShard):
        # It names the blocks of activation checkpointing under every strategy.
        reads_wrap = values.get("activation_checkpointing") is True
        unread = [f"fsdp.{key}" for key in given if not (key == "wrap" and reads_wrap)]
        for path in unread:
            yield Problem(path, f"given, but the strategy is {strategy.name}; remove it, or use `strategy: fsdp2`")
        return
    shard_ranks = given.get("shard_ranks")
    if shard_ranks is None:
        return
    if strategy is not None and strategy is not HSDP:
        given_for = f"given, but {strategy.name} shards over all ranks"
        yield Problem("fsdp.shard_ranks", f"{given_for}; remove it, or use `strategy: hsdp`")
        return
    ranks = _count_ranks(values)
    if ranks is not None and isinstance(shard_ranks, int) and shard_ranks > 0 and ranks % shard_ranks:
        yield describe_indivisible(shard_ranks, ranks)


def describe_indivisible(shard_ranks: int, ranks: int) -> Problem:
    """The problem of ranks that cannot be divided into groups of `shard_ranks`."""
    divisors = [str(number) for number in range(2, ranks + 1) if ranks % number == 0]
    shown = ", ".join(divisors) if len(divisors) < _MOST_SHOWN else f"{', '.join(divisors[: _MOST_SHOWN - 1])}, ..."
    valid = f"give {shown}" if divisors else "start several ranks"
    found = f"given {shard_ranks}, which does not divide the number of ranks, {ranks}"
    return Problem("fsdp.shard_ranks", f"{found}; remove it, or {valid}")


_MOST_SHOWN = 9


def _count_ranks(values: Mapping[str, Any]) -> int | None:
    """The number of ranks; None if the hardware or the launch decides."""
    devices, nodes = values.get("devices", "auto"), values.get("num_nodes", "auto")
    return devices * nodes if isinstance(devices, int) and isinstance(nodes, int) else None
