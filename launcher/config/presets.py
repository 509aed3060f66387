"""The presets: small config files as starting points."""

from __future__ import annotations

import difflib
import importlib.resources
from typing import Any

from launcher.config.loading import read_preset
from launcher.core.errors import ConfigError, Problem
from strategies.registry import AUTO, list_strategy_names

# From a laptop to a cluster, in the order of the wizard's list.
ALL_PRESETS = ("debug", "single-gpu", "ddp-node", "fsdp2-node", "zero2-node", "zero3-offload", "slurm-multi-node",
               "hsdp-multi-node")  # fmt: skip


def preset_names() -> tuple[str, ...]:
    """The presets whose strategy exists."""
    known = list_strategy_names()
    return tuple(name for name in ALL_PRESETS if read_preset(name).get("strategy", AUTO) in known)


def preset_values(name: str) -> dict[str, Any]:
    """A preset's plain values.

    Raises:
        ConfigError: no such preset; lists the valid ones.
    """
    names = preset_names()
    if name not in names:
        close = [*difflib.get_close_matches(str(name), names, n=1), *(each for each in names if str(name) in each)]
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError([Problem("preset", f"given {name!r}; {hint}valid are {', '.join(names)}")])
    return read_preset(name)


def preset_summary(name: str) -> str:
    """The purpose of a preset: the first line of its file."""
    text = importlib.resources.files("launcher").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("# ")
