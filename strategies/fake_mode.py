"""A fake mode in which modules may copy their parts, and copies of modules that are at hand."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

M = TypeVar("M", bound=nn.Module)


class FakeMode(FakeTensorMode):
    """Tensors without memory, whose deep copies stay in the same mode.

    torch copies the mode with the tensor. An op of this mode then takes the copy for a stranger and makes a new storage
    of it each time, so that the weights of `nn.TransformerEncoder`, which copies its layer, seem to be activations.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


def fake_copy(module: M) -> M:
    """A deep copy whose tensors are fake and take no memory; the module stays as it is.

    Raises:
        RuntimeError: no fake mode is active here.
    """
    # Real tensors are read on the way, which the mode itself does not allow.
    with unset_fake_temporarily() as mode:
        if not isinstance(mode, FakeTensorMode):
            raise RuntimeError("fake_copy was called outside of a fake mode; call it within `with FakeMode():`")
        with FakeCopyMode(mode):
            return copy.deepcopy(module)
