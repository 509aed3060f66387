"""The console: colours and bars on a terminal, otherwise plain lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment
from typing_extensions import override

# Wider than any line: files and pipes have no width, and the reader (`less`, `grep`, an editor) wraps lines itself.
_UNLIMITED = 100_000
_PADDING = re.compile(r" +(?=\n)")


class _OutputConsole(Console):
    """A reader that closes the pipe (`| head`) ends the output, and does not change the exit code."""

    @override
    def on_broken_pipe(self) -> None:
        self.quiet = True

    @override
    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        text = super()._render_buffer(buffer)
        # A table fills each of its lines with spaces up to its longest one.
        return text if self.is_terminal else _PADDING.sub("", text)


def make_console() -> Console:
    """A console on stdout; without a terminal, lines are not wrapped unless COLUMNS is set.

    NO_COLOR, FORCE_COLOR, COLUMNS, TERM and TTY_INTERACTIVE have the meanings of rich's documentation.
    """
    has_width = _is_terminal() or os.environ.get("COLUMNS", "").isdigit()
    return _OutputConsole(width=None if has_width else _UNLIMITED, highlight=False)


def is_interactive(console: Console) -> bool:
    """Whether lines may be redrawn: stdout is a terminal that can do that. FORCE_COLOR adds colours only."""
    return console.is_interactive and _is_terminal(console.file)


def _is_terminal(stream: object = None) -> bool:
    # A user's replacement of stdout may not be a file.
    return bool(getattr(sys.stdout if stream is None else stream, "isatty", bool)())
