"""Reports the progress of a script that does not know the launcher: the collectives that its ranks enter."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

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
                status.watch_collectives(_count_default_group, read_flight_record)
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


def _count_default_group() -> int:
    c10d: Any = sys.modules["torch.distributed.distributed_c10d"]
    group = c10d._get_default_group()
    return group._get_sequence_number_for_group()


def read_flight_record() -> str:
    """This rank's collectives from torch's flight recorder, as JSON."""
    import torch
    import torch.distributed as dist

    c10d: Any = vars(torch._C)["_distributed_c10d"]
    # A build with NCCL has a separate recorder for it.
    nccl = dist.get_backend() == "nccl" and hasattr(c10d, "_dump_nccl_trace_json")
    text: bytes | str = c10d._dump_nccl_trace_json() if nccl else c10d._dump_fr_trace_json()
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
