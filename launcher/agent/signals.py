"""Signals to the agent: the first asks all ranks to save and stop, a second one ends them at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# A terminal that closes, a scheduler that warns, a person: all mean the same.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A supervisor may send the same signal to a process and to its group.
_SAME_SIGNAL_WITHIN = 0.5


def means_now(first: int, second: int, seconds_between: float) -> bool:
    """Whether a second signal ends the ranks at once.

    A scheduler sends SIGTERM after its warning (USR1, USR2) while the ranks save: that must not cut the saving off.
    """
    if second == signal.SIGINT:
        return seconds_between > _SAME_SIGNAL_WITHIN
    return second == signal.SIGTERM == first and seconds_between > _SAME_SIGNAL_WITHIN


def for_ranks(number: int) -> int:
    """What the ranks get: they know SIGINT and SIGTERM, both as 'save and stop'."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


class AgentSignals:
    """Takes the signals while the agent runs.

    Args:
        forward: sends a signal to all ranks; False if there are none, and the agent itself must end.
        kill: ends all ranks at once.
        clock: seconds.
    """

    def __init__(
        self, forward: Callable[[int], bool], kill: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._forward = forward
        self._kill = kill
        self._clock = clock
        self._before: dict[int, Any] = {}
        self._since = 0.0
        self.first: int | None = None

    def __enter__(self) -> AgentSignals:
        # What is ignored stays so: `nohup` ignores the terminal's end, a shell's background job its Ctrl-C.
        wanted = [number for number in HANDLED if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self.handle) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # An impatient person's third Ctrl-C must not cut off the end of the agent, which is all that is left.
            signal.signal(number, handler if self.first is None else signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Take one signal.

        Raises:
            AgentStopped: there are no ranks to stop.
        """
        now = self._clock()
        if self.first is None:
            self.first, self._since = number, now
            if not self._forward(for_ranks(number)):
                raise AgentStopped(number)
        elif means_now(self.first, number, now - self._since):
            self._kill()


class AgentStopped(BaseException):
    """A signal came while no rank ran; no `Exception`, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
