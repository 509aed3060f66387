"""The output of a rank: events, terminal, notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from launcher.core.events import EventLog


@dataclass(frozen=True)
class RunOutput:
    """The events and the terminal of a rank; only rank zero prints notices, which may also be recorded as events.

    `translate` makes the text of a notice for the user: the command line and Python have different terms.
    """

    events: EventLog
    console: Console
    is_rank_zero: bool
    records_notices: bool = True
    translate: Callable[[str], str] = str

    def notice(self, message: str) -> None:
        """Inform the user, on rank zero."""
        if not self.is_rank_zero:
            return
        message = self.translate(message)
        if self.records_notices:
            self.events.write("notice", message=message)
        self.console.print(f"notice: {message}", style="yellow", highlight=False, markup=False)
