"""`launcher.jobs.backends.local_sweep`: a signal at the worst moment."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.backends.local_sweep import LocalSweep
from launcher.runs.sweep_record import write_array


def test_a_member_that_is_being_started_when_the_sweep_is_cancelled_is_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    write_array(tmp_path, at_once=1, members=[{"folder": str(tmp_path), "command": command}] * 2)
    sweep = LocalSweep(tmp_path)
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*words, **options))
        # As a handler would run it: the process is there, and nobody has its number yet.
        sweep._stop(signal.SIGTERM, None)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert sweep.run() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.returncode for process in started] == [-signal.SIGTERM]
