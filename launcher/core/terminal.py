"""The terminal that people read: colours and bars where there is one, plain lines where not."""

from __future__ import annotations

import sys

from rich.console import Console

# Columns of a file or pipe, which has none of its own.
_PLAIN_WIDTH = 120


class _TolerantConsole(Console):
    """Lets a reader that leaves (`| head`) take the output with it, but not the exit code."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def make_console() -> Console:
    """A console on stdout; NO_COLOR, COLUMNS and a missing terminal are respected."""
    # The user's own object in its place need not be a file.
    is_terminal = getattr(sys.stdout, "isatty", bool)()
    return _TolerantConsole(width=None if is_terminal else _PLAIN_WIDTH, highlight=False)
