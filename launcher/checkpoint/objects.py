"""The objects of a checkpoint, made from the nodes of its pickle. What a fit does not need is never made."""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._utils import _validate_loaded_sparse_tensors

from launcher.checkpoint.known_classes import NotLoaded, call_known, known, may_change
from launcher.checkpoint.pickle_nodes import Call, Global

# A fit takes these from the model and the data module that it is given.
NOT_NEEDED = frozenset(
    f"{prefix}{name}" for prefix in ("", "datamodule_") for name in ("hyper_parameters", "hparams_name", "hparams_type")
) | {"hparams", "module_arguments"}


@dataclass(frozen=True, slots=True)
class Foreign:
    """An object that only code from outside can make.

    Attributes:
        key: where it is in the checkpoint, with dots.
        kind: its class.
    """

    key: str
    kind: str

    def __str__(self) -> str:
        return f"{self.key} ({self.kind})"


class UnreadableError(Exception):
    """An object that cannot be made, with its key, its class and the reason."""


class _NeedsCode(Exception):  # noqa: N818 -- no error: it says how far a node could be made
    """A node that is made of code from outside."""


@dataclass(slots=True)
class _Maker:
    """Makes objects of nodes.

    Attributes:
        trusted: whether code from outside is imported and called, as `pickle` does it.
        foreign: what needs code from outside; filled where `trusted` is false.
        made: the objects of the nodes by their ids, and the nodes too, so that no id is taken anew.
    """

    trusted: bool
    foreign: list[Foreign] = field(default_factory=list)
    made: dict[tuple[int, bool], tuple[Any, Any]] = field(default_factory=dict)

    def make(self, node: Any, key: str, *, strict: bool = False) -> Any:
        """The object of a node.

        Args:
            node: it.
            key: where it is.
            strict: raise `_NeedsCode` instead of putting a `NotLoaded` inside.
        """
        if not isinstance(node, Call | Global | list | dict | tuple | set):
            return node
        before = self.made.get((id(node), True)) or self.made.get((id(node), strict))
        if before is not None:
            return before[1]
        try:
            if isinstance(node, Call | Global):
                return self._object(node, key, strict=strict)
            return self._container(node, key, strict=strict)
        except BaseException:  # whatever a class raises; raised on
            # It is half made.
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
        except Exception as error:  # A file may ask for anything, and the classes of a trusted one may do anything.
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
        found = known(named)
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
    """As `pickle` does it."""
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


def make_objects(tree: Any, *, trusted: bool) -> tuple[Any, tuple[Foreign, ...]]:
    """The content of a checkpoint.

    Args:
        tree: of the pickle's nodes.
        trusted: whether the objects that a fit needs may run code; the others never do.

    Returns:
        The content, and what stands in it as `NotLoaded` although a fit needs it.

    Raises:
        UnreadableError: a trusted object cannot be made.
    """
    if not isinstance(tree, Mapping):
        maker = _Maker(trusted)
        return maker.make(tree, ""), tuple(maker.foreign)
    unneeded, needed = _Maker(trusted=False), _Maker(trusted)
    content: dict[Any, Any] = {}
    for key, value in tree.items():
        content[needed.make(key, "")] = (unneeded if key in NOT_NEEDED else needed).make(value, str(key))
    _validate_loaded_sparse_tensors()
    return content, tuple(needed.foreign)
