"""A fake mode in which modules may copy their parts."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode


class FakeMode(FakeTensorMode):
    """Tensors without memory, whose deep copies stay in the same mode.

    torch copies the mode with the tensor. An op of this mode then takes the copy for a stranger and makes a new storage
    of it each time, so that the weights of `nn.TransformerEncoder`, which copies its layer, seem to be activations.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self
