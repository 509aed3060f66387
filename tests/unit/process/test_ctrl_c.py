"""A Ctrl-C that interrupted code swallows is not lost: it is raised again before ranks or a training start."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from torch.distributed import HashStore

from launcher.agent.signals import AgentSignals
from launcher.process.ctrl_c import CtrlC
from launcher.training.stop.signals import SignalListener


def listen() -> SignalListener:
    from launcher.training.stop.agreement import StopAgreement

    return SignalListener(StopAgreement(HashStore(), 0, 1), lambda _: None, lambda _: None)


STARTS: list[Callable[[], AbstractContextManager[Any]]] = [lambda: AgentSignals(lambda _: False, lambda: None), listen]


@pytest.mark.parametrize("start", STARTS, ids=["agent", "training"])
@pytest.mark.parametrize("is_swallowed", [True, False])
def test_a_swallowed_ctrl_c_is_raised_again(
    start: Callable[[], AbstractContextManager[Any]], is_swallowed: bool
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC():
        if is_swallowed:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) if is_swallowed else contextlib.nullcontext(), start():
            pass
    assert signal.getsignal(signal.SIGINT) == before
    with CtrlC() as next_command:
        assert not next_command.is_pressed
