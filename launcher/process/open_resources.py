"""What a training keeps open for the Trainer that it returns: its process group and its W&B run.

`trainer.test`, `validate`, `predict` and `fit` need both afterwards. They are closed by the next training, or at the
end of the interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable

# With the process that opened it: a fork has copies, which only its parent may close.
_kept: list[tuple[int, Callable[[], None]]] = []


def keep_open(close: Callable[[], None]) -> None:
    """Keep a resource open until the next training or the end of this process; the last one is closed first."""
    if not _kept:
        atexit.unregister(_close_at_exit)
        # Registered last, so it runs before the handlers of W&B and torch.
        atexit.register(_close_at_exit)
    _kept.append((os.getpid(), close))


def close_kept_open() -> None:
    """Close what an earlier training of this process kept open."""
    while _kept:
        process, close = _kept.pop()
        if process == os.getpid():
            close()


def _close_at_exit() -> None:
    # Python 3.12 and later starts no thread at exit (RuntimeError); W&B then ends its run itself, a moment later.
    with contextlib.suppress(RuntimeError):
        close_kept_open()
