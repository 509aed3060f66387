"""A module that calls itself begins once, even if a call raises an error."""

from __future__ import annotations

import pytest
from torch import nn

from strategies.deepspeed_patches import OutermostCall


class Nested(nn.Module):
    """Calls itself `more` times, and raises an error in the innermost call on request."""

    def forward(self, more: int, fails: bool = False) -> int:
        if more:
            return self(more - 1, fails)
        if fails:
            raise ValueError("the user's own")
        return 0


@pytest.fixture
def begun() -> tuple[nn.Module, list[object]]:
    module, seen = Nested(), list[object]()
    call = OutermostCall(lambda _, args: seen.append(args[0]))
    module.register_forward_pre_hook(call.enter)
    module.register_forward_hook(call.leave, always_call=True)
    return module, seen


def test_recursive_module_call_begins_once(begun: tuple[nn.Module, list[object]]) -> None:
    module, seen = begun
    for more in (3, 0, 1):
        module(more)
    assert seen == [3, 0, 1]


def test_call_that_raised_ends(begun: tuple[nn.Module, list[object]]) -> None:
    module, seen = begun
    with pytest.raises(ValueError, match="the user's own"):
        module(2, True)
    module(1)
    assert seen == [2, 1]
