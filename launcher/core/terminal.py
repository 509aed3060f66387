"""The console: colours and bars on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys

from rich.console import Console

# Width of files and pipes.
_PLAIN_WIDTH = 120


class _TolerantConsole(Console):
    """A reader that closes the pipe (`| head`) ends the output, and does not change the exit code."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def make_console() -> Console:
    """A console on stdout that respects NO_COLOR, COLUMNS and a missing terminal."""
    # A user's replacement of stdout may not be a file.
    is_terminal = getattr(sys.stdout, "isatty", bool)()
    return _TolerantConsole(width=None if is_terminal else _PLAIN_WIDTH, highlight=False)
