"""Inspect the classes that a config names: problems, signatures, and the number of parameters of the model."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from launcher.config.schema import RunConfig
from launcher.core.errors import ConfigError, LauncherError, Problem
from launcher.user_code.classes import UserClasses, import_classes, make_objects

Part = Literal["model", "data"]


class ModelCountError(LauncherError):
    """The model cannot be created on the meta device; the message has the error of its constructor."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The number of all parameters, and of those that get a gradient."""

    total: int
    trainable: int

    def __str__(self) -> str:
        frozen = f", {self.trainable:,} of them trainable" if self.trainable != self.total else ""
        return f"{self.total:,} parameters{frozen}"


def class_problems(config: RunConfig, part: Part) -> list[Problem]:
    """The problems with the class and arguments of the model or the data."""
    try:
        import_classes(config)
    except ConfigError as error:
        found = [problem for problem in error.problems if problem.path.startswith(f"{part}.")]
        if any(problem.path == f"{part}.class_path" for problem in found):
            # The user will fix the file: the next attempt must read it again.
            _forget((getattr(config, part) or {}).get("class_path", ""))
        return found
    return []


def signature_of(class_path: str) -> str:
    """The signature of an importable class, such as 'MyModule(lr: float = 0.1)'."""
    module, _, name = class_path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    # Type hints that `from __future__ import annotations` turned into strings are shown without quotes.
    bare = [p.replace(annotation=_Unquoted(p.annotation)) if isinstance(p.annotation, str) else p
            for p in signature.parameters.values()]  # fmt: skip
    return f"{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


class _Unquoted(str):
    """Text whose repr has no quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def count_parameters(config: RunConfig) -> ModelSize:
    """Create the model on the meta device, where it takes no memory, and count its parameters.

    Raises:
        ConfigError: the class does not import, or an argument is wrong.
        ModelCountError: its constructor raised an error, such as one that reads weights or values.
    """
    alone = dataclasses.replace(config, data=None)
    found = import_classes(alone)
    try:
        with torch.device("meta"):
            model, _ = make_objects(alone, UserClasses(found.model, None, None, None), None)
    except (Exception, SystemExit) as error:
        # The user's constructor may raise any error; its last line has the message.
        last = traceback.format_exception_only(error)[-1].strip()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}, line {where.lineno}"
        raise ModelCountError(
            f"{found.model.__name__} cannot be created on the meta device: {last} ({place})"
        ) from error
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ModelSize(sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad))


def _forget(class_path: str) -> None:
    """Remove a module of the user from the imported ones; a library is never imported twice."""
    name = class_path.rpartition(".")[0]
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "/")
    if file.is_relative_to(Path.cwd()) and "site-packages" not in file.parts:
        del sys.modules[name]
    importlib.invalidate_caches()
