"""Reports the progress of a script that does not know the launcher: the collectives that its ranks enter."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from launcher.process.collectives import count_default_group, dump_flight_record
from launcher.process.rank_status import RankStatusWriter

_INTERVAL = 1.0


def report_progress(status: RankStatusWriter) -> None:
    """Start a thread that beats while this rank enters collectives; it waits until the script has a process group."""
    if status.has_agent:
        threading.Thread(target=_watch, args=(status,), name="launcher-progress", daemon=True).start()


def _watch(status: RankStatusWriter) -> None:
    pause = threading.Event()
    entered = -1
    counts_default_group = False
    while True:
        count = count_collectives()
        if count is None:
            # The script creates its process group later, or has destroyed it: it makes progress.
            status.beat()
        else:
            if not counts_default_group:
                counts_default_group = True
                status.watch_collectives(count_default_group, dump_flight_record)
            if count != entered:
                status.beat()
            entered = count
        pause.wait(_INTERVAL)


def count_collectives() -> int | None:
    """The number of collectives that this process has entered, over all its groups; None without a process group."""
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None or not c10d.is_initialized():
        return None
    total = 0
    # A group may end meanwhile, and some back ends do not count.
    with contextlib.suppress(RuntimeError):
        for group in list(c10d._world.pg_map):
            total += _count(group._get_sequence_number_for_group)
    return total


def _count(read: Callable[[], int]) -> int:
    try:
        return read()
    except RuntimeError:
        return 0
