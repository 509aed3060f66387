"""Start a loader worker, which ignores a scheduler's SIGTERM, as its rank may be saving, and seeds each sample."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, get_worker_info

from launcher.process.parent_death import die_with_creator, die_with_parent
from launcher.process.titles import set_worker_title
from launcher.training.data.sample_seeds import seed_each_sample

# Seconds after a scheduler's signal in which the rank saves and leaves.
_GRACE = 300.0


def start_worker(worker_id: int, *, inner: Callable[[int], Any] | None, rank: int) -> None:
    """Initialize a loader worker of the rank; a `worker_init_fn`, which calls the user's own one (`inner`)."""
    ignore_ctrl_c()
    _end_with_rank()
    set_worker_title(worker_id, rank)
    ignore_scheduler_signals()
    _call_users(worker_id, inner, rank)
    info = get_worker_info()
    if info is not None:
        seed_each_sample(info.dataset)


def start_unplaced_worker(worker_id: int, *, inner: Callable[[int], Any] | None) -> None:
    """Initialize a worker of a loader whose order the launcher does not decide, such as one of the validation."""
    ignore_ctrl_c()
    _end_with_rank()
    _call_users(worker_id, inner, None)


def keep_workers_at_ctrl_c(loader: DataLoader[Any]) -> None:
    """Let the loader's workers ignore Ctrl-C. Lightning also sets this attribute of the user's loaders."""
    inner = loader.worker_init_fn
    if loader.num_workers and getattr(inner, "func", None) not in (start_worker, start_unplaced_worker):
        loader.worker_init_fn = functools.partial(start_unplaced_worker, inner=inner)


def ignore_ctrl_c() -> None:
    """Ctrl-C at a terminal reaches every process of a script: the rank saves, and needs its workers until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call_users(worker_id: int, inner: Callable[[int], Any] | None, rank: int | None) -> None:
    if inner is not None:
        inner(worker_id)
    elif os.environ.get("PL_SEED_WORKERS") == "1":
        # As Lightning does for a loader without a function.
        pl_worker_init_function(worker_id, rank)


def _end_with_rank() -> None:
    """End when the rank ends. A worker detects it only between two samples, and keeps memory, ports and pipes open."""
    # The kernel watches the thread that created this process: one that ends earlier must not end the worker.
    if threading.current_thread().name == "MainThread":
        # The kernel's parent of a process from multiprocessing's fork server is that server.
        has_server = isinstance(multiprocessing.current_process(), ForkServerProcess)
        with contextlib.suppress(OSError):
            die_with_parent() if has_server else die_with_creator()


def ignore_scheduler_signals() -> None:
    """Let SIGTERM end this process at once only if its parent sent it, which is how torch ends a worker.

    SLURM sends SIGTERM to every process of a job, and a worker that ends then would end a rank that is still saving.
    """
    parent = os.getppid()
    # Threads that start later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_wait, args=(parent,), name="launcher-worker-signals", daemon=True).start()


def _wait(parent: int) -> None:
    received = signal.sigwaitinfo({signal.SIGTERM})
    while received is not None and received.si_pid != parent and os.getppid() == parent:
        # A second SIGTERM that arrives before the first is taken is lost, also the parent's: this needs a timeout.
        received = signal.sigtimedwait({signal.SIGTERM}, _GRACE)
    os._exit(0)
