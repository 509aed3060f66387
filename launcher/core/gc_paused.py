"""Imports without the garbage collector, which finds nothing in them and takes a fifth of their time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """No automatic collection inside; what is there at the end is not looked at again.

    Modules, classes and functions live as long as the process: later collections need not walk them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
