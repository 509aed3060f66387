"""The output of a rank: events, terminal, notices."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from launcher.core.events import EventLog


@dataclass(frozen=True)
class RunOutput:
    """The events and the terminal of a rank; only rank zero prints notices, which may also be recorded as events."""

    events: EventLog
    console: Console
    is_rank_zero: bool
    records_notices: bool = True

    def notice(self, message: str) -> None:
        """Inform the user, on rank zero."""
        if not self.is_rank_zero:
            return
        if self.records_notices:
            self.events.write("notice", message=message)
        self.console.print(f"notice: {message}", style="yellow", highlight=False, markup=False)
