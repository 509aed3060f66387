"""Check the objects that a script gives: callbacks, loggers and plugins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from launcher.core.errors import ConfigError, Problem
from launcher.user_code.imports import foreign_lightning


def find_wrong_objects(callbacks: Sequence[Any], loggers: Sequence[Any], plugins: Sequence[Any]) -> list[Problem]:
    """Each object that is not of Lightning's class; Lightning is imported only if the script has imported it."""
    lightning = sys.modules.get("lightning.pytorch") if callbacks or loggers or plugins else None
    kinds: dict[str, type[Any] | tuple[()]] = {"callbacks": (), "loggers": ()}
    if lightning is not None:
        from lightning.pytorch.loggers import Logger

        kinds = {"callbacks": lightning.Callback, "loggers": Logger}
    problems = [
        Problem(f"{name}[{number}]", foreign_lightning(given) or f"given {given!r}; expected {_EXPECTED[name]}")
        for name, objects in (("callbacks", callbacks), ("loggers", loggers))
        for number, given in enumerate(objects)
        if not isinstance(given, kinds[name])
    ]
    if plugins:
        from launcher.user_code.objects import sort_plugins

        try:
            sort_plugins(plugins)
        except ConfigError as error:
            problems += error.problems
    return problems


_EXPECTED = {
    "callbacks": "an object of one of Lightning's classes of callbacks, as EarlyStopping(...)",
    "loggers": "an object of one of Lightning's classes of loggers, as CSVLogger(...)",
}
