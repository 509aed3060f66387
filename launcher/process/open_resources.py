"""What a training leaves open for the Trainer that it returns: its process group and its W&B run.

Both are needed if the script goes on with `trainer.test`, `validate`, `predict` or `fit`. The next training closes
them, or the end of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable

# With the process that left it: a fork has copies of what is its parent's to close.
_left: list[tuple[int, Callable[[], None]]] = []


def keep_open(close: Callable[[], None]) -> None:
    """Have `close` called by the next training of this process, or at its end.

    Args:
        close: called once, in the opposite order of what was left.
    """
    if not _left:
        atexit.unregister(_close_at_exit)
        # Last in, first out: W&B and torch have registered theirs already.
        atexit.register(_close_at_exit)
    _left.append((os.getpid(), close))


def close_kept_open() -> None:
    """Close what an earlier training of this process has left."""
    while _left:
        process, close = _left.pop()
        if process == os.getpid():
            close()


def _close_at_exit() -> None:
    # Python 3.12 and later starts no thread here; W&B then ends its run itself, a moment later.
    with contextlib.suppress(RuntimeError):
        close_kept_open()
