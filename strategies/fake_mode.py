"""A fake tensor mode in which modules may deep-copy their parts, and fake copies of existing modules."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

M = TypeVar("M", bound=nn.Module)


class FakeMode(FakeTensorMode):
    """Fake tensors whose deep copies stay in the same mode.

    torch copies the mode with the tensor. An op then treats the copy as foreign and creates a new storage each time, so
    that the weights of `nn.TransformerEncoder`, which copies its layer, would count as activations.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


def fake_copy(module: M) -> M:
    """A deep copy with fake tensors, which use no memory; the module is not changed.

    Raises:
        RuntimeError: no fake mode is active here.
    """
    # The copy reads real tensors, which the mode does not allow.
    with unset_fake_temporarily() as mode:
        if not isinstance(mode, FakeTensorMode):
            raise RuntimeError("fake_copy was called outside of a fake mode; call it within `with FakeMode():`")
        with FakeCopyMode(mode):
            return copy.deepcopy(module)
