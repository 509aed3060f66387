"""The classes that any checkpoint may contain, because creating their objects runs no code from the file.

These are torch's list for `weights_only`, the user's additions to it, and values such as numbers, paths and dates.
"""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import importlib
import operator
import pathlib
import pickle
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import _weights_only_unpickler as torch_unpickler
from torch._tensor import _rebuild_from_type_v2

from launcher.checkpoint.pickle_nodes import Global


class NotLoaded:
    """Replaces an object that needs code from the checkpoint; it has only the object's name."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __repr__(self) -> str:
        return f"<{self._what}, not loaded>"

    def __getattr__(self, name: str) -> Any:
        what = self.__dict__.get("_what", "an object")
        raise AttributeError(f"{name}: {what} of the checkpoint was not loaded, as this could run code from the file")


_VALUES = (
    *(NotLoaded, argparse.Namespace, types.SimpleNamespace, AttributeDict, collections.deque, uuid.UUID),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction),
    *(frozenset, slice, range, int, float, bool, str, bytes, list, dict, tuple, object, type(None)),
    *(pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path, pathlib.PosixPath),
)

# Classes of other libraries that are created like plain values; imported only if a file names them.
_LIBRARIES = {
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode", "PathNode",
                        "StringNode"),
    "typing": ("Any",),
    "deepspeed.runtime.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}  # fmt: skip
_RECONSTRUCTOR: Any = vars(copyreg)["_reconstructor"]
# Classes and functions of these packages may be named, such as an activation; they are never called here.
_NAMED = ("torch.nn.", "torch.optim.")


def find_known(named: Global) -> Any:
    """The known class or function of a name; `NotImplemented` if it is not a known one."""
    path = f"{named.module}.{named.name}"
    for table in (_table(), torch_unpickler._get_allowed_globals(), torch_unpickler._get_user_allowed_globals()):
        if path in table:
            return table[path]
    if named.name in _LIBRARIES.get(named.module, ()):
        try:
            return getattr(importlib.import_module(named.module), named.name)
        except ImportError:
            return NotImplemented
    # Only in a module that is imported already: importing one would run its code.
    found: Any = sys.modules.get(named.module)
    for part in named.name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return found
    if (
        named.module.startswith(_NAMED)
        and isinstance(found, type | types.FunctionType)
        # Not a name that the module imports from another one.
        and (found.__module__, found.__qualname__) == (named.module, named.name)
    ):
        return found
    return NotImplemented


def call_known(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, new: bool) -> Any:
    """Create an object of a known class; `pickle.UnpicklingError` if the function must not be called."""
    if isinstance(function, enum.EnumType):
        return _member(function, *args)
    if not isinstance(function, type | types.FunctionType | types.BuiltinFunctionType):
        raise pickle.UnpicklingError(f"a {type(function).__name__} must not be called")
    if (own := _CALLS.get(function)) is not None:
        return own(*args, **kwargs)
    if not _is_allowed_by_torch(function) and function not in _makers():
        raise pickle.UnpicklingError(f"{function.__module__}.{function.__qualname__} must not be called")
    if function is _rebuild_from_type_v2:
        _check_rebuilt(*args)
    if new and function is not torch.nn.Parameter:
        return cast(Any, function).__new__(function, *args, **kwargs)
    return function(*args, **kwargs)


def may_change(made: Any, step: str) -> bool:
    """Whether a file may change a known object after its creation: not a shared one, such as an enum's member."""
    kind = type(made)
    if _is_allowed_by_torch(kind):
        return True
    if step == "state":
        others = (functools.partial, collections.defaultdict, np.ndarray)
        return kind in _makers() or kind in others or isinstance(made, np.dtype)
    return isinstance(made, {"update": dict, "extend": collections.deque, "add": set}[step])


def _check_rebuilt(function: Any, kind: Any, *_: Any) -> None:
    if function not in torch_unpickler._tensor_rebuild_functions() or not _is_allowed_by_torch(kind):
        raise pickle.UnpicklingError(f"{function} does not create a tensor")


def _is_allowed_by_torch(function: Any) -> bool:
    """Compares by identity: an object of a file may compare equal to anything."""
    tables = (torch_unpickler._get_allowed_globals(), torch_unpickler._get_user_allowed_globals())
    return any(function is each for table in tables for each in table.values())


@functools.cache
def _table() -> dict[str, Any]:
    """Classes and functions by the names under which any version pickles them."""
    table: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _VALUES}
    for module in ("pathlib", "pathlib._local"):
        names = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath")
        table.update({f"{module}.{name}": getattr(pathlib, name) for name in names})
        # A path of another operating system cannot open files here.
        table[f"{module}.WindowsPath"] = pathlib.PureWindowsPath
    table.update({"functools.partial": functools.partial, "collections.defaultdict": collections.defaultdict,
                  "copyreg._reconstructor": _RECONSTRUCTOR, "builtins.getattr": getattr, "_operator.or_": operator.or_,
                  "numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray})  # fmt: skip
    for name in ("numpy.core", "numpy._core"):
        table[f"{name}.multiarray._reconstruct"] = _empty_array
        table[f"{name}.multiarray.scalar"] = _number
        table[f"{name}.numeric._frombuffer"] = _frombuffer
    table.update({f"numpy.dtypes.{kind.__name__}": kind for kind in vars(np.dtypes).values() if isinstance(kind, type)})
    return table


def _makers() -> frozenset[Any]:
    """Classes and functions other than torch's that may be called directly."""
    libraries = {getattr(sys.modules[module], name) for module, names in _LIBRARIES.items() if module in sys.modules
                 for name in names if hasattr(sys.modules[module], name)}  # fmt: skip
    return frozenset({*_VALUES, *libraries, _empty_array, _number, _frombuffer})


def _member(kind: enum.EnumType, *args: Any) -> Any:
    """A member by its value, without calling the class's own code."""
    members: list[Any] = list(kind.__members__.values())
    found = [member for member in members if len(args) == 1 and member._value_ == args[0]]
    if found:
        return found[0]
    if issubclass(kind, enum.Flag) and len(args) == 1 and isinstance(args[0], int):
        return enum.Flag._missing_.__func__(kind, args[0])  # type: ignore[attr-defined]
    raise pickle.UnpicklingError(f"{kind.__module__}.{kind.__qualname__} has no member of the value {args!r:.100}")


def _attribute(kind: Any, name: Any) -> Any:
    """Python 3.11 pickles a member of an enum as an attribute."""
    if isinstance(kind, enum.EnumType) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"attribute {name!r:.100} of {type(kind).__name__}")


def _or(one: Any, other: Any) -> Any:
    """Python 3.11.2 pickles a combined flag as two members, or as a member and the bits without a name."""
    kind = type(one)
    if not issubclass(kind, enum.Flag) or type(other) not in (kind, int):
        raise pickle.UnpicklingError(f"{kind.__name__} | {type(other).__name__}")
    return _member(kind, one._value_ | getattr(other, "_value_", other))


def _old_style(kind: Any, base: Any, state: Any) -> Any:
    if base is not object or kind not in _makers():
        raise pickle.UnpicklingError(f"{kind} must not be called")
    return object.__new__(kind)


def _default_dict(factory: Any = None, *args: Any) -> Any:
    # The factory is called for each missing key.
    if factory not in (None, list, dict, set, int, float, str, tuple, bool, collections.OrderedDict):
        raise pickle.UnpicklingError(f"{factory} as the factory of a defaultdict")
    return collections.defaultdict(factory, *args)


def _dtype(of: Any, *_: Any) -> np.dtype[Any]:
    if not isinstance(of, str | np.dtype | type):
        raise pickle.UnpicklingError("a NumPy dtype that is not given by name")
    # Always a copy: its state is set next, and NumPy shares one object of each dtype.
    return np.dtype(of, False, True)  # type: ignore[call-overload]


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"{kind} is not a NumPy array")
    return np.empty((0,), dtype="b")


def _number(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes):
        raise pickle.UnpicklingError("an invalid NumPy number")
    return np.frombuffer(content, dtype, 1)[0]


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(content, dtype=dtype).reshape(shape, order=order)


_CALLS: dict[Any, Callable[..., Any]] = {
    functools.partial: functools.partial,
    collections.defaultdict: _default_dict,
    _RECONSTRUCTOR: _old_style,
    getattr: _attribute,
    operator.or_: _or,
    np.dtype: _dtype,
}
