"""How a loader's worker begins: deaf to a scheduler's signal to the whole job, as its rank may be saving; seeded."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import get_worker_info

from launcher.process.parent_death import die_with_parent
from launcher.training.data.sample_seeds import seed_each_sample

# Seconds after a scheduler's signal in which its rank has saved and left.
_GRACE = 300.0


def start_worker(worker_id: int, *, inner: Callable[[int], Any] | None, rank: int) -> None:
    """What a loader worker does first; a `worker_init_fn`.

    Args:
        worker_id: torch's number of it.
        inner: the user's own function, None without one.
        rank: of the training process.
    """
    _end_with_rank()
    outlive_schedulers()
    if inner is not None:
        inner(worker_id)
    elif os.environ.get("PL_SEED_WORKERS") == "1":
        # Lightning does it where a loader has no function.
        pl_worker_init_function(worker_id, rank)
    info = get_worker_info()
    if info is not None:
        seed_each_sample(info.dataset)


def _end_with_rank() -> None:
    """End at once when the rank dies. Without this, a worker notices it only between two samples.

    Until then it would hold what it has of the rank: memory, ports, the pipe of its log.
    """
    # The kernel watches the thread that made this process: one that ends earlier must not end the worker.
    if threading.current_thread().name == "MainThread":
        with contextlib.suppress(OSError):
            die_with_parent()


def outlive_schedulers() -> None:
    """From now on SIGTERM ends this process at once only if its parent sent it, which torch does to end a worker.

    SLURM sends it to every process of a job: a worker that ended then would take down a rank that still saves. The
    worker ends with its rank all the same, which torch's own watch sees to.
    """
    parent = os.getppid()
    # Threads that are started later inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait, args=(parent,), name="launcher-worker-signals", daemon=True).start()


def _wait(parent: int) -> None:
    received = signal.sigwaitinfo({signal.SIGTERM})
    while received is not None and received.si_pid != parent and os.getppid() == parent:
        # A second one that comes before the first is taken is lost, the parent's too: so there is an end to it.
        received = signal.sigtimedwait({signal.SIGTERM}, _GRACE)
    os._exit(0)
