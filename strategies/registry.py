"""All strategies by name. Pure: an entry imports its libraries when it builds something.

A package adds its own by an entry point in the group `launcher.strategies`, a program by `register`:

    [project.entry-points."launcher.strategies"]
    my_ddp = "my_package.strategies:MyDdp"      # a subclass of `strategies.base.StrategyEntry`, or an object of one
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from strategies.base import StrategyEntry, StrategyError
from strategies.ddp import Distributed, DistributedUnused
from strategies.deepspeed_config import ZeroVariant
from strategies.fsdp import FSDP2, FSDP2_GRAD_OP, FSDP2_OFFLOAD, HSDP
from strategies.single_device import SingleDevice
from strategies.zero import ZERO_1, ZERO_2, ZERO_2_OFFLOAD, ZERO_3, ZERO_3_NVME, ZERO_3_OFFLOAD, Zero

AUTO = "auto"
ENTRY_POINTS = "launcher.strategies"
SINGLE_DEVICE, DDP = SingleDevice(), Distributed()
_entries: dict[str, StrategyEntry] = {}
# Names of entry points that cannot be loaded, and why.
_broken: dict[str, str] = {}


def register(entry: StrategyEntry) -> None:
    """Add a strategy, for this process and those forked from it.

    Raises:
        StrategyError: another strategy has that name.
    """
    if entry.name in (AUTO, *_entries):
        raise StrategyError(f"strategy {entry.name!r} exists already; choose another name")
    _entries[entry.name] = entry


for _entry in (SINGLE_DEVICE, DDP, DistributedUnused(), FSDP2, FSDP2_GRAD_OP, HSDP,
               ZERO_1, ZERO_2, ZERO_3, FSDP2_OFFLOAD, ZERO_2_OFFLOAD, ZERO_3_OFFLOAD, ZERO_3_NVME):  # fmt: skip
    register(_entry)


def list_strategies() -> tuple[StrategyEntry, ...]:
    """All strategies in their order."""
    _load_entry_points()
    return tuple(sorted(_entries.values(), key=lambda entry: entry.order))


def list_candidates() -> tuple[StrategyEntry, ...]:
    """The strategies that `strategy: auto` compares, in their order."""
    return tuple(entry for entry in list_strategies() if entry.is_candidate)


def list_strategy_names() -> tuple[str, ...]:
    """The valid values of `strategy:` in a config."""
    return (AUTO, *(entry.name for entry in list_strategies()))


def find_strategy(name: str) -> StrategyEntry:
    """The strategy of that name.

    Raises:
        StrategyError: there is none.
    """
    if name not in _entries:
        _load_entry_points()
    if name not in _entries:
        known = ", ".join(list_strategy_names())
        raise StrategyError(f"strategy {name!r} does not exist; valid are {known}{describe_broken(name)}")
    return _entries[name]


def describe_broken(name: str) -> str:
    """The end of a message about an unknown strategy: why the package that defines it cannot be loaded, if one does."""
    return f" ({_broken[name]})" if name in _broken else ""


def find_requested(name: Any) -> StrategyEntry | None:
    """The strategy that a config requests; None for `auto`, and for what is no strategy."""
    return _entries.get(name) if isinstance(name, str) and name in list_strategy_names() else None


def list_zero_variants() -> Mapping[str, ZeroVariant]:
    """The variants of ZeRO by name."""
    return {entry.name: entry.variant for entry in list_strategies() if isinstance(entry, Zero)}


@functools.cache
def _load_entry_points() -> None:
    from strategies.entry_points import load_entry_points

    loaded, broken = load_entry_points(ENTRY_POINTS, StrategyEntry)
    _broken.update(broken)
    for entry in loaded:
        try:
            register(entry)
        except StrategyError as error:
            _broken[entry.name] = str(error)
