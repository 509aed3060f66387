"""Signals to the agent: the first makes all ranks save and stop, a second one kills them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from launcher.process.ctrl_c import CtrlC
from launcher.process.parent_death import STOP_SIGNALS

# Seconds in which the same signal counts once: a supervisor may send it to a process and to its group.
_SAME_SIGNAL_WITHIN = 0.5


def is_kill_request(first: int, second: int, seconds_between: float) -> bool:
    """Whether a second signal kills the ranks.

    A scheduler sends SIGTERM after its warning (USR1, USR2), while the ranks save. That must not interrupt the save.
    SIGINT and SIGQUIT come from a person at the terminal.
    """
    is_by_person = second in (signal.SIGINT, signal.SIGQUIT)
    return seconds_between > _SAME_SIGNAL_WITHIN and (is_by_person or second == signal.SIGTERM == first)


def to_rank_signal(number: int) -> int:
    """The signal for the ranks, which handle SIGINT and SIGTERM as save and stop."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


class AgentSignals:
    """Handles signals while the agent runs; `forward` sends one to all ranks and returns False if there are none."""

    def __init__(
        self, forward: Callable[[int], bool], kill: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._forward = forward
        self._kill = kill
        self._clock = clock
        self._before: dict[int, Any] = {}
        self._since = 0.0
        self.first: int | None = None
        # Whether a second signal has killed the ranks.
        self.is_second = False

    def __enter__(self) -> AgentSignals:
        CtrlC.raise_lost()
        # Ignored signals stay ignored: `nohup` ignores SIGHUP, and a shell's background job SIGINT.
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self.handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # A third Ctrl-C must not interrupt the end of the agent.
            signal.signal(number, handler if self.first is None else signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle one signal.

        Raises:
            AgentStopped: no rank is running.
        """
        now = self._clock()
        if self.first is None:
            self.first, self._since = number, now
            if not self._forward(to_rank_signal(number)):
                raise AgentStopped(number)
        elif is_kill_request(self.first, number, now - self._since):
            self.is_second = True
            self._kill()


class AgentStopped(BaseException):
    """A signal arrived while no rank was running. Not an `Exception`, so that no handler treats it as a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
