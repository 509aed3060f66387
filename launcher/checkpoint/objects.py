"""Creates the objects of a checkpoint from the nodes of its pickle, except those that a fit does not need."""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._utils import _validate_loaded_sparse_tensors

from launcher.checkpoint.known_classes import NotLoaded, call_known, find_known, may_change
from launcher.checkpoint.pickle_nodes import Call, Global

# A fit takes these from its model and data module.
NOT_NEEDED = frozenset(
    f"{prefix}{name}" for prefix in ("", "datamodule_") for name in ("hyper_parameters", "hparams_name", "hparams_type")
) | {"hparams", "module_arguments"}


@dataclass(frozen=True, slots=True)
class Foreign:
    """An object that only untrusted code can create: its dotted path in the checkpoint, and its class."""

    key: str
    kind: str

    def __str__(self) -> str:
        return f"{self.key} ({self.kind})"


class UnreadableError(Exception):
    """An object cannot be created; the text has its key, its class and the reason."""


class _NeedsCode(Exception):  # noqa: N818 -- not an error, but a result
    """A node needs untrusted code."""


@dataclass(slots=True)
class _Maker:
    """Creates objects from nodes; if `trusted`, untrusted code is imported and called, as `pickle` does."""

    trusted: bool
    # The objects that need untrusted code; filled if `trusted` is false.
    foreign: list[Foreign] = field(default_factory=list)
    # Node and object by the node's id; keeping the node keeps its id from being used again.
    made: dict[tuple[int, bool], tuple[Any, Any]] = field(default_factory=dict)

    def make(self, node: Any, key: str, *, strict: bool = False) -> Any:
        """Create the object of a node; if `strict`, raise `_NeedsCode` instead of creating a `NotLoaded`."""
        if not isinstance(node, Call | Global | list | dict | tuple | set):
            return node
        before = self.made.get((id(node), True)) or self.made.get((id(node), strict))
        if before is not None:
            return before[1]
        try:
            if isinstance(node, Call | Global):
                return self._object(node, key, strict=strict)
            return self._container(node, key, strict=strict)
        except BaseException:  # any error of a class; raised on
            # The object is not complete.
            self.made.pop((id(node), strict), None)
            raise

    def _container(self, node: Any, key: str, *, strict: bool) -> Any:
        if isinstance(node, dict):
            self.made[id(node), strict] = node, (pairs := {})
            pairs.update(self._pairs(node.items(), key, strict=strict))
            return pairs
        if isinstance(node, list):
            self.made[id(node), strict] = node, (items := [])
            items += [self.make(item, f"{key}.{n}", strict=strict) for n, item in enumerate(node)]
            return items
        made = type(node)(self.make(item, f"{key}.{n}", strict=strict) for n, item in enumerate(node))
        self.made[id(node), strict] = node, made
        return made

    def _pairs(self, pairs: Any, key: str, *, strict: bool) -> list[tuple[Any, Any]]:
        made: list[tuple[Any, Any]] = []
        for name, value in pairs:
            inside = f"{key}.{name}" if isinstance(name, str | int) else key
            made.append((self.make(name, key, strict=strict), self.make(value, inside, strict=strict)))
        return made

    def _object(self, node: Call | Global, key: str, *, strict: bool) -> Any:
        try:
            made = self._global(node) if isinstance(node, Global) else self._called(node, key)
            self.made[id(node), strict] = node, made
            for step, value in node.steps if isinstance(node, Call) else ():
                self._take_step(made, step, value, key, strict=strict)
        except (_NeedsCode, UnreadableError):
            if strict or self.trusted:
                raise
        except Exception as error:  # A file may contain anything, and the classes of a trusted one may raise any error.
            if self.trusted:
                raise UnreadableError(f"{key} ({node}): {type(error).__name__}: {error}") from error
            if strict:
                raise _NeedsCode(str(node)) from error
        else:
            return made
        made = NotLoaded(str(node))
        self.foreign.append(Foreign(key, str(node)))
        self.made[id(node), strict] = node, made
        return made

    def _global(self, named: Global) -> Any:
        found = find_known(named)
        if found is not NotImplemented:
            return found
        if not self.trusted:
            raise _NeedsCode(str(named))
        found = importlib.import_module(named.module)
        for part in named.name.split("."):
            found = getattr(found, part)
        return found

    def _called(self, node: Call, key: str) -> Any:
        function = self.make(node.function, key, strict=True)
        args = self.make(node.args, key, strict=True)
        kwargs = self.make(node.kwargs or {}, key, strict=True)
        try:
            return call_known(function, args, kwargs, new=node.new)
        except pickle.UnpicklingError:
            if not self.trusted:
                raise
        return function.__new__(function, *args, **kwargs) if node.new else function(*args, **kwargs)

    def _take_step(self, made: Any, step: str, value: Any, key: str, *, strict: bool) -> None:
        if not self.trusted and not may_change(made, step):
            raise pickle.UnpicklingError(f"{step} of a {type(made).__name__}")
        if step == "update":
            for name, item in self._pairs(value, key, strict=strict):
                made[name] = item
            return
        content = self.make(value, key, strict=strict)
        if step == "state":
            _set_state(made, content)
        elif step == "add":
            for item in content:
                made.add(item)
        else:
            made.extend(content)


def _set_state(made: Any, state: Any) -> None:
    """As `pickle` does."""
    if type(made) is torch.Tensor:
        made.set_(*state)
    elif type(made) is OrderedDict:
        made.__dict__.update(state)
    elif hasattr(made, "__setstate__"):
        made.__setstate__(state)
    else:
        slots = None
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        if state:
            made.__dict__.update(state)
        for name, value in (slots or {}).items():
            setattr(made, name, value)


def make_objects(tree: Any, *, trusted: bool, has_all: bool = False) -> tuple[Any, tuple[Foreign, ...]]:
    """Create the content of a checkpoint, and list the objects in it that are `NotLoaded` although they are needed.

    A fit needs all but the `NOT_NEEDED`; `has_all`: those are needed too.

    Raises:
        UnreadableError: a trusted object cannot be created.
    """
    if not isinstance(tree, Mapping):
        maker = _Maker(trusted)
        return maker.make(tree, ""), tuple(maker.foreign)
    unneeded, needed = _Maker(trusted=False), _Maker(trusted)
    content: dict[Any, Any] = {}
    for key, value in tree.items():
        content[needed.make(key, "")] = (unneeded if key in NOT_NEEDED and not has_all else needed).make(
            value, str(key)
        )
    _validate_loaded_sparse_tensors()
    return content, tuple(needed.foreign)
