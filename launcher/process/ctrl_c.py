"""The Ctrl-C of a command, until a training or the agent handles signals itself."""

from __future__ import annotations

import signal
import threading
from typing import ClassVar


class CtrlC:
    """Records the first Ctrl-C, which raises a KeyboardInterrupt as usual, and ignores later ones."""

    _is_recorded: ClassVar[bool] = False

    def __init__(self) -> None:
        self._is_installed = False

    @property
    def is_pressed(self) -> bool:
        """Whether there was one."""
        return CtrlC._is_recorded

    def __enter__(self) -> CtrlC:
        CtrlC._is_recorded = False
        is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_usual and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)
            self._is_installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_installed and signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, number: int, frame: object) -> None:
        if not self.is_pressed:
            CtrlC._is_recorded = True
            raise KeyboardInterrupt

    @classmethod
    def raise_lost(cls) -> None:
        """Repeat a Ctrl-C that the code it interrupted has swallowed, as imports of libraries do.

        Raises:
            KeyboardInterrupt: there was one.
        """
        if cls._is_recorded:
            raise KeyboardInterrupt
