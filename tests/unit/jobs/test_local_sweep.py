"""`launcher.jobs.backends.local_sweep`: a signal while a member starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.backends.local_sweep import LocalSweep
from launcher.runs.sweep_record import write_array


def test_a_member_that_starts_while_the_sweep_is_cancelled_is_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    write_array(tmp_path, at_once=1, members=[{"folder": str(tmp_path), "command": command}] * 2)
    sweep = LocalSweep(tmp_path)
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))
        # As from a signal handler: the process exists, but is not in the list yet.
        sweep._stop(signal.SIGTERM, None)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert sweep.run() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.returncode for process in started] == [-signal.SIGTERM]
