"""Whether the classes that a config names have the data loader that a command needs."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

from lightning.pytorch.core.hooks import DataHooks

from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, Problem
from launcher.user_code.classes import UserClasses, callback_classes

_LIBRARIES = ("lightning", "torch", "builtins")


def check_loader(config: RunConfig, classes: UserClasses, loader: str) -> None:
    """Check for a method such as `train_dataloader`, before anything is created.

    Raises:
        ConfigError: no class has it.
    """
    owner = classes.model if classes.data is None else classes.data
    # A class, or a callback, may set the loader as an attribute later.
    if any(_has_loader(cls, loader) for cls in (owner, classes.model, *callback_classes(config))):
        return
    if classes.data is not None:
        raise ConfigError([Problem("data", f"{owner.__name__} has no {loader}; add this method to it")])
    problem = (
        f"not given, and {owner.__name__} has no {loader}; give --data my_pkg.MyData, or add this method to the model"
    )
    raise ConfigError([Problem("data", problem)])


def _has_loader(cls: type[Any], loader: str) -> bool:
    """Whether a class overrides a loader, or its code mentions it."""
    if issubclass(cls, DataHooks) and getattr(cls, loader) is not getattr(DataHooks, loader):
        return True
    own = [each for each in cls.__mro__ if each.__module__.partition(".")[0] not in _LIBRARIES]
    return any(loader in _names_in(code) for each in own for value in vars(each).values()
               if (code := getattr(getattr(value, "__wrapped__", value), "__code__", None)) is not None)  # fmt: skip


def _names_in(code: CodeType) -> Iterator[str]:
    """The attributes and texts in a function, and in functions inside it."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, str):
            yield value
        elif isinstance(value, CodeType):
            yield from _names_in(value)
