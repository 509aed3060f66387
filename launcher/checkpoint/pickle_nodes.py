"""Reads a pickle as a tree of nodes: nothing is imported, called or created.

torch reads the storages of a checkpoint's file and passes the pickle to `NODES` instead of the module `pickle`.
"""

from __future__ import annotations

import pickle
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch


class Global:
    """A class or function that the pickle names, by `__module__` and `__qualname__`."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"


class Call:
    """An object that the pickle creates by a call, and the steps that change the object afterwards.

    If `new`, the call is of `function.__new__`. `steps` has pairs in their order: `state` with the state, `extend` with
    a list, `update` with a list of pairs, `add` with a list of members of a set.
    """

    __slots__ = ("args", "function", "kwargs", "new", "steps")

    def __init__(self, function: Any, args: Any, kwargs: Any = None, *, new: bool = False) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.new = new
        self.steps: list[tuple[str, Any]] = []

    def __str__(self) -> str:
        """The name of the class that the call creates, as far as the pickle contains it."""
        args = self.args if isinstance(self.args, tuple) else ()
        # These create an object of their first argument.
        makers = ("copyreg._reconstructor", "builtins.getattr", "getattr", "functools.partial")
        first = args[0] if args and isinstance(args[0], Global | Call) else None
        return str(first if str(self.function) in makers and first is not None else self.function)


# torch compares storages with these while it reads them.
_STORAGES = {("torch.storage", kind.__name__): kind for kind in (torch.UntypedStorage, torch.storage.TypedStorage)}
# The implementation in Python, whose opcodes can be replaced.
_Unpickler: Any = vars(pickle)["_Unpickler"]


class _NodeUnpickler(_Unpickler):
    """Python's unpickler; every opcode that would run code creates a node instead."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return _STORAGES.get((module, name)) or Global(module, name)

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = Call(self.stack[-1], args)

    def _new(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = Call(self.stack[-1], args, new=True)

    def _new_with_names(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = Call(self.stack[-1], args, kwargs, new=True)

    def _build(self) -> None:
        state = self.stack.pop()
        self._add_step("state", state)

    def _append(self) -> None:
        self._extend_by([self.stack.pop()])

    def _appends(self) -> None:
        self._extend_by(self.pop_mark())

    def _extend_by(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        else:
            self._add_step("extend", items)

    def _setitem(self) -> None:
        value = self.stack.pop()
        self._update_by([self.stack.pop(), value])

    def _setitems(self) -> None:
        self._update_by(self.pop_mark())

    def _update_by(self, items: list[Any]) -> None:
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if type(self.stack[-1]) is dict:
            self.stack[-1].update(pairs)
        else:
            self._add_step("update", pairs)

    def _additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(items)
        else:
            self._add_step("add", items)

    def _add_step(self, step: str, value: Any) -> None:
        if not isinstance(self.stack[-1], Call):
            raise pickle.UnpicklingError(f"{step} of a {type(self.stack[-1]).__name__}, which is not an object")
        self.stack[-1].steps.append((step, value))

    def _instance(self) -> None:
        args = tuple(self.pop_mark())
        self.stack.append(Call(args[0], args[1:]))

    def _old_instance(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.stack.append(Call(self.find_class(module, name), tuple(self.pop_mark())))

    def _refused(self) -> NoReturn:
        raise pickle.UnpicklingError("it uses the registry of copyreg, which torch.save does not")

    dispatch.update({
        pickle.REDUCE[0]: _reduce, pickle.NEWOBJ[0]: _new, pickle.NEWOBJ_EX[0]: _new_with_names,
        pickle.BUILD[0]: _build, pickle.APPEND[0]: _append, pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _setitem, pickle.SETITEMS[0]: _setitems, pickle.ADDITEMS[0]: _additems,
        pickle.OBJ[0]: _instance, pickle.INST[0]: _old_instance,
        pickle.EXT1[0]: _refused, pickle.EXT2[0]: _refused, pickle.EXT4[0]: _refused,
    })  # fmt: skip


# For the argument `pickle_module` of `torch.load`.
NODES = types.SimpleNamespace(__name__=__name__, Unpickler=_NodeUnpickler)
