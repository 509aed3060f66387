from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from launcher.agent.signals import HANDLED, AgentSignals, AgentStopped, for_ranks, means_now

INT, TERM, USR2, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP


@pytest.fixture(autouse=True)
def _handlers_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("first", "second", "seconds", "now"),
    [(INT, INT, 1.0, True), (INT, INT, 0.1, False), (TERM, INT, 1.0, True), (TERM, TERM, 1.0, True),
     (USR2, TERM, 30.0, False), (USR2, USR2, 30.0, False), (HUP, TERM, 1.0, False), (HUP, HUP, 1.0, False)],
)  # fmt: skip
def test_which_second_signal_ends_at_once(first: int, second: int, seconds: float, now: bool) -> None:
    assert means_now(first, second, seconds) is now


def test_ranks_get_the_two_signals_that_they_know() -> None:
    assert [for_ranks(number) for number in HANDLED] == [INT, TERM, TERM, TERM, TERM]


def test_the_first_is_handed_on_and_the_second_kills() -> None:
    said: list[object] = []
    times = iter((0.0, 0.1, 5.0))

    def forward(number: int) -> bool:
        said.append(number)
        return True

    signals = AgentSignals(forward, lambda: said.append("kill"), clock=lambda: next(times))
    with signals:
        for _ in range(3):
            os.kill(os.getpid(), INT)
    assert said == [INT, "kill"]
    assert signals.first == INT
    # What comes now finds an agent that is ending already.
    assert {signal.getsignal(number) for number in HANDLED} == {signal.SIG_IGN}


def test_without_ranks_the_agent_itself_ends() -> None:
    with AgentSignals(lambda _: False, lambda: None) as signals, pytest.raises(AgentStopped) as caught:
        signals.handle(TERM)
    assert caught.value.number == TERM


def test_what_was_ignored_stays_ignored_and_handlers_are_put_back() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    term = signal.getsignal(TERM)
    try:
        with AgentSignals(lambda _: True, lambda: None) as signals:
            assert signal.getsignal(HUP) is signal.SIG_IGN
            assert signal.getsignal(TERM) == signals.handle
        assert signal.getsignal(TERM) is term
    finally:
        signal.signal(HUP, before)
