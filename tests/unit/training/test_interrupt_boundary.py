"""An error that Ctrl-C has caused is the interruption; others are not changed."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.core.errors import Interrupted
from launcher.training.failures import interrupt_boundary

LOST_WORKER = "DataLoader worker (pid 3) is killed by signal: Interrupt."


def _fail(folder: Path, received: int | None, text: str) -> None:
    run: Any = SimpleNamespace(run=SimpleNamespace(checkpoints=folder))
    listener: Any = SimpleNamespace(first=received, progress=SimpleNamespace(step=5))
    with interrupt_boundary(run, listener):
        raise RuntimeError(text)


@pytest.mark.parametrize("text", [LOST_WORKER, "DataLoader worker (pid(s) 3, 4) exited unexpectedly",
                                  "[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:4"])  # fmt: skip
def test_a_lost_process_after_ctrl_c_is_the_interruption(tmp_path: Path, text: str) -> None:
    with pytest.raises(Interrupted) as caught:
        _fail(tmp_path, signal.SIGINT, text)
    assert (caught.value.step, caught.value.checkpoint, caught.value.exit_code) == (5, None, 130)


@pytest.mark.parametrize(
    ("received", "text"), [(None, LOST_WORKER), (signal.SIGTERM, LOST_WORKER), (signal.SIGINT, "no such label")]
)
def test_other_errors_are_not_changed(tmp_path: Path, received: int | None, text: str) -> None:
    with pytest.raises(RuntimeError, match=r"worker|label"):
        _fail(tmp_path, received, text)
