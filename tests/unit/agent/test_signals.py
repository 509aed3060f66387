from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from launcher.agent.signals import AgentSignals, AgentStopped, is_kill_request, to_rank_signal
from launcher.process.parent_death import STOP_SIGNALS

INT, TERM, USR2, HUP, QUIT = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("first", "second", "seconds", "now"),
    [(INT, INT, 1.0, True), (INT, INT, 0.1, False), (TERM, INT, 1.0, True), (TERM, TERM, 1.0, True),
     (QUIT, QUIT, 1.0, True), (TERM, QUIT, 1.0, True),
     (USR2, TERM, 30.0, False), (USR2, USR2, 30.0, False), (HUP, TERM, 1.0, False), (HUP, HUP, 1.0, False)],
)  # fmt: skip
def test_which_second_signal_kills(first: int, second: int, seconds: float, now: bool) -> None:
    assert is_kill_request(first, second, seconds) is now


def test_ranks_receive_sigint_or_sigterm() -> None:
    assert [to_rank_signal(number) for number in STOP_SIGNALS] == [INT, *[TERM] * 5]


def test_the_first_signal_is_forwarded_and_the_second_kills() -> None:
    actions: list[object] = []
    times = iter((0.0, 0.1, 5.0))

    def forward(number: int) -> bool:
        actions.append(number)
        return True

    signals = AgentSignals(forward, lambda: actions.append("kill"), clock=lambda: next(times))
    with signals:
        for _ in range(3):
            os.kill(os.getpid(), INT)
    assert actions == [INT, "kill"]
    assert signals.first == INT
    # A later signal must not interrupt the end of the agent.
    assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}


def test_without_ranks_the_agent_ends() -> None:
    with AgentSignals(lambda _: False, lambda: None) as signals, pytest.raises(AgentStopped) as caught:
        signals.handle(TERM)
    assert caught.value.number == TERM


def test_ignored_signals_stay_ignored_and_handlers_are_restored() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    term = signal.getsignal(TERM)
    try:
        with AgentSignals(lambda _: True, lambda: None) as signals:
            assert signal.getsignal(HUP) is signal.SIG_IGN
            assert signal.getsignal(TERM) == signals.handle
        assert signal.getsignal(TERM) is term
    finally:
        signal.signal(HUP, before)
