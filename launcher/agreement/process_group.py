"""The store of the ranks, and the process group over it.

The group is created here and not by Lightning because torchelastic's store outlives an attempt: a group without
a prefix finds the addresses of dead ranks in it, and the restart fails or hangs. Each attempt has its own
prefix.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.core.errors import AgreementError, TopologyError
from launcher.hardware.topology import Topology
from launcher.process.collectives import enable_flight_recorder
from launcher.process.fork_safety import wait_before_forks
from launcher.process.open_resources import keep_open
from launcher.process.rank_status import FOLDER_VARIABLE

if TYPE_CHECKING:
    from torch.distributed import Store

# The stores that this process is connected to, and how many trainings have used each.
_stores: dict[tuple[str, int, int], tuple[Store, int]] = {}

# Seconds between two looks at how many ranks have arrived, for each rank that looks.
_LONGEST_PAUSE = 0.001
_ENDED = "launcher/script-ended"
_PRINTS_ERROR = "launcher/prints-error"


def open_store(topology: Topology, timeout: float) -> Store:
    """Connect to the store of this run's ranks; rank zero serves it if no agent does.

    A process that trains again keeps its connection, because another server could end during this training. Each
    training has its own prefix.

    Raises:
        AgreementError: the store cannot be served or reached.
    """
    import torch.distributed as dist

    if topology.master_addr is None or topology.master_port is None:
        return dist.HashStore()
    place = (topology.master_addr, topology.master_port, topology.rank)
    if place in _stores:
        store, trainings = _stores[place]
        _stores[place] = (store, trainings + 1)
        store.set_timeout(timedelta(seconds=timeout))
        return dist.PrefixStore(f"training-{trainings}", store)
    serves = topology.rank == 0 and not topology.agent_store
    try:
        store = dist.TCPStore(
            topology.master_addr,
            topology.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        role = "serve" if serves else "reach"
        raise AgreementError(
            f"rank {topology.rank} ({topology.host}) cannot {role} the store at {topology.master_addr}:"
            f"{topology.master_port}: {error}; look at rank 0's log, and check that nodes can reach this port",
            [0],
        ) from error
    _stores[place] = (store, 1)
    return store


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Settings of a process group.

    Attributes:
        attempt: the token that this attempt's ranks agreed on.
        timeout: seconds after which a collective that waits for a rank fails.
        dump_folder: NCCL's watchdog writes its flight record there when it ends this rank, for torch's own tools.
        stays_open: whether it stays open after a successful training, for the Trainer that is returned.
    """

    backend: str | None
    attempt: str
    timeout: float
    dump_folder: Path | None = None
    stays_open: bool = False


@contextmanager
def process_group(store: Store, topology: Topology, settings: GroupSettings) -> Iterator[None]:
    """A process group that only the ranks of this attempt can join; none without a backend.

    A group that the user's code has created is used and not destroyed, as Lightning does.

    Raises:
        TopologyError: the user's group has other ranks.
    """
    if settings.backend is None:
        yield
        return
    import torch
    import torch.distributed as dist

    wait_before_forks()
    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != (topology.rank, topology.world_size):
            raise TopologyError(
                f"this process is rank {found[0]} of {found[1]} in a process group that exists already, and rank "
                f"{topology.rank} of {topology.world_size} in this training; destroy that group first"
            )
        yield
        return
    enable_flight_recorder()
    device = None
    if settings.backend == "nccl":
        device = torch.device("cuda", topology.local_rank)
        torch.cuda.set_device(device)
        if settings.dump_folder is not None:
            # Read when the group is created; torch's default folder is one for all runs of the user.
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(settings.dump_folder / "flight-record-rank-"))
    _await_ranks(store, topology.world_size, settings)
    dist.init_process_group(
        settings.backend,
        store=dist.PrefixStore(f"launcher/{settings.attempt}/group", store),
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=timedelta(seconds=settings.timeout),
        device_id=device,
    )
    try:
        yield
    except BaseException:  # Ctrl-C too: the group must not outlive the run; raised again
        # The others may be in a collective that this rank never joins, and NCCL would wait for them; gloo does not.
        if settings.backend != "nccl":
            _destroy()
        elif settings.stays_open:
            keep_open(_abort)
        raise
    if settings.stays_open:
        keep_open(_destroy)
    else:
        _destroy()


def _await_ranks(store: Store, world_size: int, settings: GroupSettings) -> None:
    """Wait in Python until all ranks are here: Ctrl-C does not end the group's own wait, which is in C code.

    The launcher's agent needs no such wait, because it kills a rank that does not end.
    """
    if {FOLDER_VARIABLE, "TORCHELASTIC_RUN_ID"} <= os.environ.keys():
        return
    arrived, pause = f"launcher/{settings.attempt}/arrived", 0.001
    deadline = time.monotonic() + settings.timeout
    count = store.add(arrived, 1)
    # After the deadline the group's own wait raises the error.
    while count < world_size and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE * max(world_size, 20))
        count = store.add(arrived, 0)


def announce_end() -> None:
    """Inform the other ranks of this script that rank zero takes part in no further training."""
    for store, _ in _stores.values():
        with suppress(RuntimeError):
            store.set(_ENDED, "1")


def rank_zero_has_ended() -> bool:
    """Whether rank zero of this script has called `announce_end`."""
    return _has_key(_ENDED)


def announce_error() -> None:
    """Inform the other ranks of this script that rank zero prints the error that ends all of them."""
    for store, _ in _stores.values():
        with suppress(RuntimeError):
            store.set(_PRINTS_ERROR, "1")


def rank_zero_prints_error() -> bool:
    """Whether rank zero of this script has called `announce_error`."""
    return _has_key(_PRINTS_ERROR)


def _has_key(key: str) -> bool:
    with suppress(RuntimeError):  # its store is gone; a rank that waits for it gets that error
        return any(store.check([key]) for store, _ in _stores.values())
    return False


def _abort() -> None:
    """Abort a group whose collectives may have started on some ranks only."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def _destroy() -> None:
    import torch.distributed as dist

    # The script may have destroyed it, or a rank that has lost another one.
    if dist.is_initialized():
        dist.destroy_process_group()
