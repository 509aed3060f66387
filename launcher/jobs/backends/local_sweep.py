"""`python -m launcher.jobs.backends.local_sweep FOLDER`: runs the members of a sweep on this machine.

SIGTERM is passed to the running members, which save and stop; no other member starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.jobs.backends.local import LocalBackend
from launcher.process.background import OUTPUT, start_time
from launcher.runs.submission_record import write_record
from launcher.runs.sweep_record import read_array_record

_POLL_SECONDS = 0.2


class LocalSweep:
    """The members, one process each, as the record in the submission's folder lists them."""

    def __init__(self, folder: Path) -> None:
        record = read_array_record(folder)
        self._waiting: list[dict[str, Any]] = list(record["members"])
        self._at_once = int(record.get("at_once") or 1)
        self._running: list[subprocess.Popen[bytes]] = []
        self._failed = 0
        self._stopped = False

    def run(self) -> int:
        """Run all; returns 0 if every member succeeded, else 1."""
        signal.signal(signal.SIGTERM, self._stop)
        while self._running or (self._waiting and not self._stopped):
            while self._waiting and len(self._running) < self._at_once and not self._stopped:
                self._start(self._waiting.pop(0))
            time.sleep(_POLL_SECONDS)
            for process in [p for p in self._running if p.poll() is not None]:
                self._running.remove(process)
                self._failed += process.returncode != 0
        return int(bool(self._failed or self._waiting))

    def _start(self, member: dict[str, Any]) -> None:
        folder = Path(member["folder"])
        descriptor = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as output:
            process = subprocess.Popen(member["command"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._running.append(process)
        if self._stopped:
            # The signal came before this process was in the list.
            process.send_signal(signal.SIGTERM)
        write_record(folder, LocalBackend.name, pid=process.pid, started=start_time(process.pid), output=[OUTPUT])

    def _stop(self, number: int, frame: object) -> None:
        del frame
        self._stopped = True
        for process in self._running:
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(LocalSweep(Path(sys.argv[1])).run())
