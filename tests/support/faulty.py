"""The toy with a fault: `fault` happens in step `at` of rank `by_rank`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.support.toy import Toy


class Faulty(Toy):
    """`times`: how often the fault happens, over all attempts of the run; each writes a marker next to TRACE."""

    def __init__(self, fault: str = "none", at: int = 3, by_rank: int = 1, times: int = 1, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.fault, self.at, self.by_rank, self.times = fault, at, by_rank, times

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == self.by_rank and self.global_step == self.at and self._due():
            FAULTS[self.fault]()
        return super().training_step(batch, batch_idx)

    def _due(self) -> bool:
        for number in range(self.times):
            mark = Path(os.environ["TRACE"] + f"-fault-{number}")
            if not mark.exists():
                mark.touch()
                return True
        return False


def _raise() -> None:
    raise ValueError("the user's own mistake")


def _fill_the_disk() -> None:
    # More than the test's small disk has, through Python and through the descriptor.
    for _ in range(200):
        print("x" * 10_000)
        sys.stderr.write("y" * 10_000 + "\n")
    with contextlib.suppress(OSError):
        os.write(1, b"z" * 100_000)


def _eat_memory() -> None:
    """Allocate in the test's control group, so that the kernel kills this process and no other."""
    (Path(os.environ["MEMORY_GROUP"]) / "cgroup.procs").write_text(str(os.getpid()))
    eaten: list[bytearray] = []
    while True:
        eaten.append(bytearray(b"x") * 2**22)


FAULTS: dict[str, Any] = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: ctypes.string_at(0),
    "exit 3": lambda: os._exit(3),
    "raise": _raise,
    "import": lambda: __import__("nowhere"),
    "sleep": lambda: threading.Event().wait(),
    "fill": _fill_the_disk,
    "eat memory": _eat_memory,
}


class _Early(type(Toy)):
    """Fails on rank one when the launcher reads the class, before a process group exists."""

    @property
    def static_graph(cls) -> bool:
        if os.environ["RANK"] == "1":
            raise OSError("a licence server that rank one cannot reach")
        return True


class FailsEarly(Toy, metaclass=_Early):
    pass
