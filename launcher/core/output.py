"""The output of a rank: events, terminal, notices."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from launcher.core.events import EventLog


@dataclass(frozen=True)
class RunOutput:
    """Where a rank writes its events and notices.

    Attributes:
        events: of the run.
        console: rank zero's terminal.
        is_rank_zero: notices of other ranks are dropped.
        records_notices: whether a notice is also an event.
    """

    events: EventLog
    console: Console
    is_rank_zero: bool
    records_notices: bool = True

    def notice(self, message: str) -> None:
        """Inform the user; only rank zero does."""
        if not self.is_rank_zero:
            return
        if self.records_notices:
            self.events.write("notice", message=message)
        self.console.print(f"notice: {message}", style="yellow", highlight=False, markup=False)
