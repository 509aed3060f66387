"""Objects in user checkpoints: plain values, and objects whose loading runs code."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import operator
import pathlib
import re
import types
import uuid
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import nn


class Kind(enum.Enum):
    SMALL = "small"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


class Switch(enum.Flag):
    A = 1
    B = 2
    C = 4


class OldSwitch(enum.Flag, boundary=enum.KEEP):
    """Pickled as by Python 3.11.2."""

    A = 1
    B = 2
    C = 4

    def __reduce_ex__(self, proto: Any) -> Any:
        bits = [bit for bit in (1, 2, 4) if self.value & bit]
        more = self.value & ~7
        if more and bits:
            return operator.or_, (OldSwitch(self.value & 7), more)
        if len(bits) > 1:
            return operator.or_, (OldSwitch(self.value & ~bits[0]), OldSwitch(bits[0]))
        return (getattr, (OldSwitch, self.name)) if bits else (OldSwitch, (self.value,))


@dataclasses.dataclass
class State:
    count: int
    weights: torch.Tensor
    inner: Any = None


class Table(dict):  # type: ignore[type-arg]
    """Like the configs of many libraries."""


class Items(list):  # type: ignore[type-arg]
    """Pickled with its items."""


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3

    def method(self) -> int:
        return self.value


class Pair(NamedTuple):
    a: int
    b: Any


class Circle:
    def __init__(self) -> None:
        self.itself = self


class Marked(torch.Tensor):
    """A subclass, as in image libraries."""


def scaled(value: float, by: float = 2.0) -> float:
    return value * by


def tensor_with_attribute() -> torch.Tensor:
    tensor = torch.arange(3.0)
    tensor.note = "mine"  # type: ignore[attr-defined]
    return tensor


def ordered_with_attribute() -> Any:
    state = collections.OrderedDict(a=torch.ones(1))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return state


VALUES: dict[str, Any] = {
    "numpy float": np.float32(0.5),
    "numpy int": np.int64(7),
    "numpy bool": np.bool_(True),
    "numpy date": np.datetime64("2024-02-03"),
    "numpy text": np.str_("text"),
    "numpy dtype": np.dtype("f4"),
    "array": np.arange(6.0).reshape(2, 3),
    "array in columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "array of records": np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "array of objects": np.array([1, "a", None], dtype=object),
    "array of texts": np.array(["a", "bc"]),
    "path": pathlib.Path("/data/x"),
    "enum": Kind.SMALL,
    "enum of a tuple": Kind.PAIR,
    "int enum": Level.LOW,
    "flags": Switch.A | Switch.C,
    "flags of an old Python": OldSwitch.A | OldSwitch.B | OldSwitch.C,
    "flags of an old Python without a name": OldSwitch(9),
    "no flags of an old Python": OldSwitch(0),
    "time": datetime.datetime(2024, 2, 3, 4, 5, 6, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    "day": datetime.date(2024, 2, 3),
    "span": datetime.timedelta(days=1, seconds=2),
    "namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "simple namespace": types.SimpleNamespace(a=[1, 2]),
    "attributes": AttributeDict(a=1, b=AttributeDict(c=2)),
    "partial": functools.partial(nn.functional.leaky_relu, negative_slope=0.1),
    "partial of a class": functools.partial(torch.optim.Adam, lr=0.1),
    "class of torch": nn.ReLU,
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "ordered": ordered_with_attribute(),
    "counter": collections.Counter("aab"),
    "default dict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "set": {1, 2},
    "frozen set": frozenset({1, (2, 3)}),
    "bytes": b"\0\xff",
    "byte array": bytearray(b"ab"),
    "complex": 1 + 2j,
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "slice": slice(1, 9, 2),
    "range": range(1, 9, 2),
    "large": 10**40,
    "tensor": torch.arange(4.0),
    "parameter": nn.Parameter(torch.ones(2)),
    "sparse": torch.eye(2).to_sparse(),
    "tensor with an attribute": tensor_with_attribute(),
    "nested": {"a": [(1, {"b": np.float64(2)}), Kind.SMALL], 3: None, Level.LOW: "key"},
}
NEED_CODE: dict[str, Any] = {
    "object": State(3, torch.ones(2), inner=[State(4, torch.zeros(1))]),
    "dict of a class": Table(a=1, b=State(1, torch.ones(1))),
    "list of a class": Items([1, 2]),
    "slots": Slots(),
    "bound method": Slots().method,
    "tuple of a class": Pair(1, (2, 3)),
    "partial": functools.partial(scaled, by=3.0),
    "class": State,
    "function": scaled,
    "module": nn.Linear(2, 2),
    "generator": np.random.default_rng(3),
    "pattern": re.compile("a+"),
    "exception": ValueError("text"),
    "circle": Circle(),
    "tensor of a class": torch.ones(2).as_subclass(Marked),
    "inside of values": {"a": [(1, collections.OrderedDict(b=State(1, torch.ones(1))))]},
    "as a key": {Pair(1, 2): 3},
    "in a set": {Pair(1, 2)},
}


def same(one: Any, other: Any) -> bool:
    """Whether two objects are of one type and have the same content."""
    if type(one) is not type(other):
        return False
    if isinstance(one, enum.Flag):
        # In Python 3.11.2 a flag without a name differs from itself.
        return one._value_ == other._value_
    if isinstance(one, torch.Tensor):
        equal = torch.equal(one.to_dense(), other.to_dense())
        return equal and one.layout == other.layout and same(dict(vars(one)), dict(vars(other)))
    if isinstance(one, np.ndarray):
        return (
            one.dtype == other.dtype
            and one.tolist() == other.tolist()
            and (one.flags.f_contiguous == other.flags.f_contiguous)
        )
    if isinstance(one, functools.partial):
        return same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if isinstance(one, Circle):
        return other.itself is other
    if isinstance(one, nn.Module):
        return same(dict(one.state_dict()), dict(other.state_dict()))
    if isinstance(one, np.random.Generator):
        return same(one.bit_generator.state, other.bit_generator.state)
    if isinstance(one, types.MethodType):
        return same(one.__self__, other.__self__) and one.__func__ is other.__func__
    if isinstance(one, Exception):
        return one.args == other.args
    if isinstance(one, dict):
        return len(one) == len(other) and all(k in other and same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Slots):
        return one.value == other.value
    if isinstance(one, State | types.SimpleNamespace | argparse.Namespace):
        return same(vars(one), vars(other))
    return bool(one == other)
